"""A line for every request at `info`: for people in text, as fields in JSON, never too many."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.http.request_log import LINES_PER_SECOND
from service.observability.logs import JsonFormatter, LogFormat, TextFormatter
from tests.support.http_service import RunningService, serve, until
from tests.support.tiny_models import make_adapter, make_backbone

LINES = {"content-type": "application/x-ndjson"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), API_KEYS="reads", ADMIN_KEYS="all") as running:
        running.client.headers["authorization"] = "Bearer all"
        for seed, name in enumerate("abcdefg"):
            running.put(name, make_adapter(make_backbone(), seed=seed))
        yield running


@contextmanager
def logged(form: LogFormat = "text", level: int = logging.INFO) -> Iterator[list[str]]:
    """The lines of requests within the block, filled when it ends."""
    stream = io.StringIO()
    lines: list[str] = []
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(None) if form == "json" else TextFormatter(None))
    logger = logging.getLogger("service.requests")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        lines += stream.getvalue().splitlines()


@pytest.mark.slow
def test_a_prediction_is_one_line_that_can_be_read(live: RunningService) -> None:
    inputs = ["free", {"text": "win", "adapter": "b"}, "now"]
    with logged() as lines:
        live.client.post(
            "/v1/predict",
            json={"adapter": "a", "inputs": inputs},
            headers={"x-request-id": "mine"},
        )
    (line,) = lines
    assert " info service.requests request=mine POST /v1/predict 200 " in line
    shown = line.partition(" 200 ")[2]
    assert float(shown.split()[0]) > 0
    assert shown.partition(" ms ")[2] == "texts=3 adapters=a,b client=env:admin-1 from=127.0.0.1"


def test_json_has_the_same_as_fields(live: RunningService) -> None:
    with logged("json") as lines:
        live.predict(adapter="a", inputs=["x", "y"])
    (content,) = map(json.loads, lines)
    assert content["message"] == "request"
    assert content["level"] == "info"
    expected = {"method": "POST", "path": "/v1/predict", "route": "/v1/predict", "status": 200}
    expected |= {"outcome": "success", "error": None, "texts": 2, "adapters": "a"}
    assert expected.items() <= content.items()
    assert content["ms"] > 0


def test_all_protocols_say_how_many_texts_and_which_adapters(live: RunningService) -> None:
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["x", "y"]}
    with logged() as lines:
        live.client.post("/adapters/a/predict", json={"inputs": [["x"], ["y"]]})
        live.client.post("/v2/models/b/infer", json={"inputs": [tensor]})
        live.client.post("/v1/predict/stream?adapter=c", content='"x"\n' * 300, headers=LINES)
        live.client.get("/v1/adapters/d")
    ends = [line.partition(" ms ")[2].partition(" client=")[0] for line in lines]
    assert ends == [
        "texts=2 adapters=a",
        "texts=2 adapters=b",
        "texts=300 adapters=c",
        "adapters=d",
    ]


def test_a_refusal_has_its_error_and_what_clients_send_cannot_forge_a_line(
    live: RunningService,
) -> None:
    with logged() as lines:
        live.client.post("/v1/predict", json={"adapter": "none", "inputs": "x"})
        live.client.get("/a%0a2026-01-01T00:00:00 info forged", headers={"authorization": "x"})
        live.client.get("/" + "a" * 5000)
    unknown, forged, long = lines
    assert " POST /v1/predict 404 " in unknown
    assert unknown.endswith("error=adapter_not_found")
    assert " GET /a\\n2026-01-01T00:00:00 info forged 401 " in forged
    assert forged.endswith("error=unauthorized")
    assert len(long) < 500


def test_many_adapters_do_not_make_a_long_line(live: RunningService) -> None:
    with logged() as lines:
        live.predict(inputs=[{"text": "x", "adapter": name} for name in "abcdefg"])
    (line,) = lines
    assert "texts=7 adapters=a,b,c,d,e,... " in line


def test_probes_and_pages_are_quiet_unless_they_fail_or_debug_is_on(live: RunningService) -> None:
    paths = ("/readyz", "/healthz", "/metrics", "/docs", "/openapi.json")
    with logged() as quiet:
        for path in paths:
            live.client.get(path)
    with logged(level=logging.DEBUG) as loud:
        for path in paths:
            live.client.get(path)
    assert quiet == []
    assert [line.split()[5] for line in loud] == list(paths)


def test_a_flood_is_counted_and_does_not_hide_what_fails(live: RunningService) -> None:
    sent = 3 * LINES_PER_SECOND
    with logged() as lines:
        stream = logging.getLogger("service.requests").handlers[-1].stream  # type: ignore[attr-defined]

        def counted() -> int:
            """Requests that succeeded and have a line, or are in the line that ends a second."""
            written = stream.getvalue().splitlines()
            left_out = (line.partition("succeeded=")[2] for line in written)
            shown = sum("GET /v1/adapters/a 200" in line for line in written)
            return shown + sum(int(rest.split()[0]) for rest in left_out if rest)

        for number in range(sent):
            live.client.get("/v1/adapters/a")
            if number % LINES_PER_SECOND == 0:
                live.client.get("/v1/adapters/none")
        # The flood may last longer than a second; each second that leaves requests out has a line.
        until(lambda: counted() == sent)
    good = [line for line in lines if "GET /v1/adapters/a 200" in line]
    failed = [line for line in lines if "GET /v1/adapters/none 404" in line]
    counts = [line for line in lines if "were not logged" in line]
    assert len(failed) == 3
    assert len(good) < sent
    assert counts
    assert all(line.endswith("failed=0") for line in counts)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["info", "warning"])
def test_the_level_of_the_settings_decides(tmp_path: Path, level: str) -> None:
    with logged(level=getattr(logging, level.upper())) as lines, serve(tmp_path) as running:
        running.client.get("/v1/adapters")
    # `serve` asks until the service is ready, and a probe that fails has its line, too.
    shown = [line for line in lines if "GET /readyz 503" not in line]
    assert ["GET /v1/adapters 200" in line for line in shown] == [True] * (level == "info")
