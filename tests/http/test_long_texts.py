"""A text of megabytes costs what is read of it, keeps its deadline, and disturbs nobody."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from service.errors import TooLarge
from service.http.bodies import parse_json
from service.settings import read_settings
from tests.support.http_service import RunningService, error_of, serve, until
from tests.support.service_process import ReadyService, ready_service
from tests.support.tiny_models import make_adapter, make_backbone, save_backbone

MEGABYTES_7 = 7_000_000
LONG = {
    "dots": "." * MEGABYTES_7,
    "letters": "a " * (MEGABYTES_7 // 2),
    "one word": "a" * MEGABYTES_7,
    "spaces": " " * (MEGABYTES_7 - 1) + "x",
}
# The same texts in short: what a model of 128 positions reads of them.
SHORT = {"dots": "." * 200, "letters": "a " * 200, "one word": "a" * 101, "spaces": "x"}
# Combining marks have no place where two parts of them could be normalised apart.
UNCUTTABLE = "\u0301" * 400_000
JSON = {"content-type": "application/json"}
LINES = {"content-type": "application/x-ndjson"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        running.put("spam", make_adapter(make_backbone(), seed=1))
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_a_text_of_megabytes_has_the_answer_of_the_part_that_is_read(
    live: RunningService, kind: str
) -> None:
    body = {"adapter": "spam", "timeout_ms": 10_000}
    long, short = (
        live.predict(**body, inputs=text)["results"][0] for text in (LONG[kind], SHORT[kind])
    )
    assert long == short


@pytest.mark.parametrize("direction", ["Left", "Right"])
def test_a_long_text_is_cut_at_either_end_by_tei(live: RunningService, direction: str) -> None:
    text = "free " + "good card " * 200_000 + "win"
    body = {"inputs": text, "truncation_direction": direction}
    response = live.client.post("/adapters/spam/predict", json=body)
    near = "free " + "good card " * 100 if direction == "Right" else "good card " * 100 + "win"
    body["inputs"] = near
    assert response.json() == live.client.post("/adapters/spam/predict", json=body).json()
    assert response.headers["x-compute-tokens"] == "128"


def test_what_cannot_be_divided_is_refused_and_the_input_is_named(live: RunningService) -> None:
    inputs = ["fine", "a " * 20_000, UNCUTTABLE]
    response = live.client.post("/v1/predict", json={"adapter": "spam", "inputs": inputs})
    assert response.status_code == 422
    (fault,) = error_of(response)["details"]
    assert fault.startswith("inputs.2: more than 131072 characters without a place to divide them")
    shorter = live.predict(adapter="spam", inputs=UNCUTTABLE[:100_000])["results"]
    assert shorter[0]["tokens"] == 2


def test_the_tokens_of_a_refused_text_are_counted_up_to_a_bound(live: RunningService) -> None:
    body = {"adapter": "spam", "inputs": ["a " * 3_000_000, "a " * 200], "truncate": False}
    started = time.monotonic()
    details = error_of(live.client.post("/v1/predict", json=body))["details"]
    assert [item.split(",")[0] for item in details] == [
        "inputs.0: more than 8192 tokens",
        "inputs.1: 202 tokens",
    ]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("item", [b"[],", b"{},", b'"",', b'{"text":"[["},', b'"a b, c",'])
def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(
    live: RunningService, item: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"adapter":"spam","inputs":[' + item * 140_000 + b'"a"]}'
    monkeypatch.setattr(orjson, "loads", None)
    response = live.client.post("/v1/predict", content=body, headers=JSON)
    assert (response.status_code, error_of(response)["type"]) == (413, "too_large")
    assert error_of(response)["message"] == "the body has more than 131072 values"


def test_so_is_one_of_keys_on_every_route_and_in_a_line(live: RunningService) -> None:
    body = b'{"inputs":[],"parameters":{%s}}' % b",".join(b'"%x":1' % i for i in range(140_000))
    for path in ("adapters/spam", "v2/models/spam/infer", "v2/repository/index", "classify"):
        response = live.client.post(path, content=body, headers=JSON)
        assert response.status_code == 413, path
    line = live.client.post("/v1/predict/stream", content=body, headers=LINES).json()
    assert line["error"]["message"] == "the line has more than 131072 values"


def test_what_is_in_strings_is_no_value(live: RunningService) -> None:
    text = '[{"\\,' * 300_000
    assert live.predict(adapter="spam", inputs=text)["results"][0]["truncated"]


def test_values_are_counted_exactly_and_as_many_more_are_allowed_as_more_inputs() -> None:
    body = b"[" + b",".join([b'"\\\\",{"a":"b"}'] * 40_000) + b"]"
    assert len(parse_json(body, most=120_000)) == 80_000
    with pytest.raises(TooLarge, match="more than 119999 values"):
        parse_json(body, most=119_999)
    assert read_settings({}).max_values == 2**17
    assert read_settings({"IDSPAM_MAX_INPUTS": "20000"}).max_values == 200_000


def test_tokenising_ends_at_the_deadline(live: RunningService) -> None:
    """Runs that are shortened are read to their end, which takes longer than this deadline."""
    body = {"adapter": "spam", "inputs": [" " * 2_000_000 + "x"] * 3, "timeout_ms": 1}
    response = live.client.post("/v1/predict", json=body)
    assert (response.status_code, error_of(response)["type"]) == (504, "deadline_exceeded")


def test_tokenising_stops_when_the_client_has_gone(
    live: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    encoder = live.service.engine.info.encoder
    original = encoder.steps

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        steps = original(*args, **kwargs)
        for _ in range(1000):
            yield
            taken += 1
            time.sleep(0.01)
        return (yield from steps)

    monkeypatch.setattr(encoder, "steps", slow)
    with pytest.raises(httpx.ReadTimeout):
        live.client.post(
            "/v1/predict", json={"adapter": "spam", "inputs": "a " * 5000}, timeout=0.3
        )
    until(lambda: live.service._in_flight == 0)
    time.sleep(0.1)
    stopped = taken
    time.sleep(0.3)
    assert taken == stopped < 500


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("workers", [0, 2])
def test_long_texts_at_once_cost_little_memory_and_disturb_nobody(
    tmp_path: Path, workers: int
) -> None:
    backbone = save_backbone(tmp_path / "backbone")
    with (
        ready_service(backbone, tmp_path, workers=workers) as running,
        httpx.Client(base_url=running.url, timeout=30) as client,
    ):
        host = load_backbone(str(backbone), device="cpu")
        file = serialize(make_adapter(host, seed=1))
        assert client.put("/v1/adapters/spam", content=file).status_code == 201
        for _ in range(20):
            client.post("/v1/predict", json={"adapter": "spam", "inputs": "warm"})
        before = memory_of(running)
        slowest: list[float] = []
        bodies = [
            json.dumps({"adapter": "spam", "inputs": text, "timeout_ms": 5000}).encode()
            for text in LONG.values()
        ]

        def post(body: bytes) -> None:
            started = time.monotonic()
            headers = {"content-type": "application/json"}
            response = httpx.post(
                f"{running.url}/v1/predict", content=body, headers=headers, timeout=30
            )
            assert response.status_code == 200, response.text
            slowest.append(time.monotonic() - started)

        threads = [threading.Thread(target=post, args=(body,)) for body in bodies * 2]
        for thread in threads:
            thread.start()
        beside, peak = [], before
        while any(thread.is_alive() for thread in threads):
            started = time.monotonic()
            client.post("/v1/predict", json={"adapter": "spam", "inputs": "free win"})
            beside.append(time.monotonic() - started)
            peak = max(peak, memory_of(running))
        assert len(slowest) == len(threads)
        assert peak - before < 300
        # The median: the load comes from the same cores.
        assert sorted(beside)[len(beside) // 2] < 0.3


def memory_of(running: ReadyService) -> float:
    """MiB of the service's processes."""
    pids = [running.process.pid, *running.children().values()]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * 4096 / 2**20
