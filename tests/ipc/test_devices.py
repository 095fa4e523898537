"""One service on two devices: real processes, each with an engine on the CPU."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from tests.support.open_stream import OpenStream
from tests.support.profiles import profiled, usual_texts
from tests.support.service_process import (
    TEXTS,
    Load,
    ReadyService,
    alone,
    body_of,
    ready_service,
    until,
)
from tests.support.tiny_models import make_adapter

# Each test starts processes, or uses those that the first one has started.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadyService]:
    """Shared: every test leaves it ready, even after killing a process."""
    temporary = tmp_path_factory.mktemp("d")
    with ready_service(folder, temporary, DEVICE="cpu,cpu", UNCERTAIN_TEXTS="3") as running:
        yield running


ENGINES = ("engine", "engine-1")
LOADS = "idspam_adapter_loads_total"


def has_loaded(service: ReadyService, adapters: float) -> Callable[[], bool]:
    """Whether so many were copied onto devices."""
    return lambda: service.metric(LOADS, tier="active") >= adapters


def ran(service: ReadyService) -> list[float]:
    """Texts that each engine has run."""
    series = service.series()
    name = "idspam_engine_texts_total"
    return [series.get((name, frozenset({("engine", engine)})), 0.0) for engine in ENGINES]


def missing(service: ReadyService) -> int:
    answer = httpx.get(f"{service.url}/readyz").json()
    return int(answer["details"].get("devices_missing", 2))


def test_both_devices_answer_alike_and_share_the_texts(
    service: ReadyService, saved: Backbone
) -> None:
    adapter = make_adapter(saved, seed=1)
    put = httpx.put(f"{service.url}/v1/adapters/a", content=serialize(adapter))
    assert put.status_code == 201
    answers: dict[str, list[list[float]]] = {text: [] for text in TEXTS}
    with httpx.Client(base_url=service.url) as client:
        for turn in range(40):
            text = TEXTS[turn % len(TEXTS)]
            body = body_of("a", text) | {"explain": True}
            result = client.post("/v1/predict", json=body).json()["results"][0]
            assert result["explanation"]["words"] or not text
            answers[text].append([item["score"] for item in result["scores"]])
        vectors = client.post("/v1/embeddings", json={"input": list(TEXTS[:2])})
        assert vectors.status_code == 200
    with OpenStream(service.url) as stream:
        stream.send(*({"adapter": "a", "text": text} for text in TEXTS * 5))
        stream.end()
        assert all("label" in line for line in stream.rest())
    for text, scores in answers.items():
        assert scores[0] == pytest.approx(alone(saved, adapter, text), abs=1e-5)
        assert all(others == scores[0] for others in scores), "an answer depends on its device"
    until(lambda: sum(ran(service)) >= 60)
    first, second = ran(service)
    assert min(first, second) >= 15, "one device has done nearly all"


def test_what_is_published_is_on_all_devices_when_the_put_returns(
    service: ReadyService, saved: Backbone
) -> None:
    with service.clients(2) as clients:
        until(lambda: service.metric("idspam_tier_adapters", tier="active") >= 1)
        time.sleep(0.6)
        loaded = service.metric(LOADS, tier="active")
        for seed in range(10, 14):
            adapter = make_adapter(saved, seed=seed)
            put = clients[seed % 2].put("/v1/adapters/hot", content=serialize(adapter))
            assert put.status_code in (200, 201)
            # On each device, although nothing was asked yet.
            loaded += 2
            until(has_loaded(service, loaded))
            expected = alone(saved, adapter, TEXTS[0])
            for client in clients * 4:
                answer = client.post("/v1/predict", json=body_of("hot", TEXTS[0])).json()
                scores = [item["score"] for item in answer["results"][0]["scores"]]
                assert scores == pytest.approx(expected, abs=1e-5), "an old revision has answered"
        time.sleep(0.6)
        assert service.metric(LOADS, tier="active") == loaded
        unloaded = clients[0].post("/v2/repository/models/hot/unload")
        assert unloaded.status_code == 200
        for client in clients * 2:
            refused = client.post("/v1/predict", json=body_of("hot", TEXTS[0]))
            assert refused.status_code == 409
        assert clients[1].delete("/v1/adapters/hot").status_code == 204


def test_trials_and_drift_count_the_texts_of_all_devices(
    service: ReadyService, saved: Backbone
) -> None:
    with httpx.Client(base_url=service.url, timeout=30) as client:
        for seed, query in ((21, ""), (22, "?stage=true")):
            adapter = profiled(make_adapter(saved, seed=seed), saved, usual_texts(300))
            content = serialize(adapter)
            put = client.put(f"/v1/adapters/tried{query}", content=content)
            assert put.status_code in (200, 201)
            staged = put.json()["revision"]
        rule = {"max_disagreement": None, "max_latency_ratio": None, "max_error_rate": None}
        divided = client.put(
            "/v1/adapters/tried/traffic", json={"revision": staged, "percent": 50, "rule": rule}
        )
        assert divided.status_code == 200, divided.text
        before = ran(service)
        for turn in range(60):
            answer = client.post("/v1/predict", json=body_of("tried", f"{TEXTS[0]} {turn}"))
            assert answer.status_code == 200

        def figures() -> dict[str, Any]:
            shown: dict[str, Any] = client.get("/v1/adapters/tried/traffic").json()
            return shown

        def current() -> int:
            return int(figures()["figures"]["current"]["texts"])

        def read() -> int:
            return current() + int(figures()["figures"]["canary"]["texts"])

        until(lambda: read() == 60)
        until(lambda: sum(ran(service)) >= sum(before) + 60)
        assert all(now > was for now, was in zip(ran(service), before, strict=True))
        until(lambda: client.get("/v1/adapters/tried/drift").json()["texts"] == current())
        uncertain = "/v1/adapters/tried/uncertain"
        kept = client.get(uncertain).json()["texts"]
        assert len(kept) == 3
        assert client.delete(uncertain).status_code == 204
        # On either device the same texts are wanted again.
        again = max(kept, key=lambda item: item["certainty"])["text"]
        for _ in range(8):
            client.post("/v1/predict", json=body_of("tried", again))
        until(lambda: again in [item["text"] for item in client.get(uncertain).json()["texts"]])
        assert client.delete("/v1/adapters/tried").status_code == 204


def test_a_killed_further_engine_costs_no_answer(service: ReadyService, saved: Backbone) -> None:
    adapter = make_adapter(saved, seed=1)
    httpx.put(f"{service.url}/v1/adapters/a", content=serialize(adapter))
    expected = [alone(saved, adapter, text) for text in TEXTS]
    with Load(service.url, "a") as load:
        until(lambda: len(load.answers) > 50)
        killed = service.kill("engine-1")
        until(lambda: service.children().get("engine-1", killed) != killed)
        until(lambda: missing(service) == 0)
        after = len(load.answers)
        until(lambda: len(load.answers) > after + 50)
    assert load.statuses() == {200}
    assert not load.errors
    for index, _, answer in load.answers:
        scores = [item["score"] for item in answer["results"][0]["scores"]]
        assert scores == pytest.approx(expected[index], abs=1e-5)
    assert service.metric("idspam_failures_total", reason="unavailable") == 0
    assert service.metric("idspam_processes", kind="engine") == 2


def test_without_the_first_engine_what_runs_is_answered_and_the_rest_waits_for_it(
    service: ReadyService, saved: Backbone
) -> None:
    adapter = make_adapter(saved, seed=1)
    httpx.put(f"{service.url}/v1/adapters/a", content=serialize(adapter))
    with Load(service.url, "a") as load:
        until(lambda: len(load.answers) > 50)
        killed = service.kill("engine")
        until(lambda: service.children().get("engine", killed) != killed)
        until(lambda: httpx.get(f"{service.url}/readyz").status_code == 200)
        until(lambda: missing(service) == 0)
        after = len(load.answers)
        until(lambda: len(load.answers) > after + 50)
    assert load.statuses() <= {200, 503}
    assert load.answers[-1][1] == 200
    # The other engine follows the new one.
    put = httpx.put(f"{service.url}/v1/adapters/b", content=serialize(make_adapter(saved, seed=2)))
    assert put.status_code == 201
    with httpx.Client(base_url=service.url) as client:
        for _ in range(8):
            assert client.post("/v1/predict", json=body_of("b", TEXTS[0])).status_code == 200


def test_a_stopped_further_engine_is_passed_over_and_no_change_waits_for_it(
    service: ReadyService, saved: Backbone
) -> None:
    adapter = make_adapter(saved, seed=1)
    httpx.put(f"{service.url}/v1/adapters/a", content=serialize(adapter))
    stopped = service.children()["engine-1"]
    os.kill(stopped, signal.SIGSTOP)
    until(lambda: missing(service) == 1)
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(httpx.post(f"{service.url}/v1/predict", json=body_of("a", "x")).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert statuses == [200] * 8
    put = httpx.put(
        f"{service.url}/v1/adapters/c", content=serialize(make_adapter(saved, seed=3)), timeout=20
    )
    assert put.status_code == 201
    # The supervisor would do so by itself, seconds later.
    os.kill(stopped, signal.SIGKILL)
    until(lambda: missing(service) == 0)
