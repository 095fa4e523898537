"""Long answers leave turns to other requests, and are what they were."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http import turns
from service.http.classify import ranked
from service.http.turns import in_turns
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone

LABELS = tuple(f"label {index:04}" for index in range(200))
TEXTS = [f"text {index}" for index in range(20)]
LINES = {"content-type": "application/x-ndjson"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        backbone = make_backbone()
        running.put("one", make_adapter(backbone, seed=1, labels=LABELS))
        sets = make_adapter(
            backbone, seed=1, labels=LABELS, activation="sigmoid", thresholds=(0.1,) * len(LABELS)
        )
        running.put("sets", sets)
        yield running


async def test_others_get_a_turn_whenever_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(turns, "perf_counter", lambda: now)
    done: list[int] = []

    def made() -> Iterator[int]:
        nonlocal now
        for item in range(5):
            done.append(item)
            now += turns.TURN_SECONDS / 2
            yield item

    asyncio.get_running_loop().call_soon(lambda: done.append(-1))
    assert await in_turns(made()) == [0, 1, 2, 3, 4]
    assert done == [0, 1, 2, -1, 3, 4]


def oip(output: str, **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}
    return {"inputs": [tensor], "outputs": [{"name": output, "parameters": parameters}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("v1/predict", {"adapter": "one", "inputs": TEXTS}),
        ("v1/predict", {"adapter": "sets", "inputs": TEXTS, "top_k": 1}),
        ("adapters/one/predict", {"inputs": [[text] for text in TEXTS]}),
        ("classify", {"model": "one", "input": TEXTS}),
        ("v1/embeddings", {"input": TEXTS}),
        ("embed", {"inputs": TEXTS}),
        ("v2/models/one/infer", oip("probs")),
        ("v2/models/one/infer", oip("probs", classification=200)),
        ("v2/models/one/infer", oip("probs", classification=200, binary_data=True)),
        ("v2/models/sets/infer", oip("predicted")),
        ("v1/predict/stream?adapter=one", TEXTS),
    ],
)
def test_every_protocol_gives_turns_while_it_writes(
    live: RunningService, path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> bytes:
        if isinstance(body, list):
            lines = "".join(json.dumps(text) + "\n" for text in body)
            answer = live.client.post(path, content=lines, headers=LINES)
        else:
            answer = live.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        # What differs between two answers to the same request.
        return answer.content.partition(b'"timings_ms"')[0].partition(b'"usage"')[0]

    given = 0
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        nonlocal given
        given += 1
        await sleep(seconds)

    monkeypatch.setattr(turns, "TURN_SECONDS", 60.0)
    without = ask()
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.0)
    monkeypatch.setattr("service.http.turns.asyncio.sleep", counted)
    assert len(ask()) == len(without)
    assert given >= 2


@given(
    st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), min_size=1, max_size=80),
    st.none() | st.integers(1, 100),
)
def test_the_best_are_those_of_a_whole_stable_sort(scores: list[float], top_k: int | None) -> None:
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
    best = ranked(np.array(scores, dtype=np.float32), top_k)
    assert best == [(index, scores[index]) for index in order]
