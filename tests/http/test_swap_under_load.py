"""Replacing an adapter while it is asked: no failed request, no mixed answer, no stale one."""

import asyncio
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.adapter import classify, prepare
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, serialize
from adapters.packed.packing import Row, RowShape
from tests.support.http_service import serve
from tests.support.tiny_models import make_adapter

pytestmark = pytest.mark.slow

CLIENTS = 16
UPLOADS = 100
# Between a client's answer and its next request: the machine is shared with the service.
PAUSE_SECONDS = 0.1
TEXTS = ("free win now", "my card is not good", "", "hello you call the bad card " * 3)


@dataclass(frozen=True)
class Answered:
    """A request and its answer.

    text: index in `TEXTS`. after_upload: the last upload that had returned when it began.
    alone: no upload was under way between its beginning and its answer.
    """

    text: int
    after_upload: int
    alone: bool
    status: int
    body: dict[str, Any]


async def test_uploads_under_load_fail_no_request_and_leave_no_stale_answer(
    tmp_path: Path, backbone: Backbone
) -> None:
    # The two revisions differ in all that a batch is made of: prompt length, layer, labels.
    adapters = [
        make_adapter(backbone, seed=1, labels=("ham", "spam")),
        make_adapter(backbone, seed=2, labels=("x", "y", "z"), prompt_length=7, insertion_layer=2),
    ]
    with serve(tmp_path) as live:
        revisions = [live.put("swapped", adapter) for adapter in adapters]
        answers = await _load(live.url, [serialize(adapter) for adapter in adapters])
        failed = live.metric("idspam_requests_total", route="/v1/predict", outcome="server_error")

    expected = {
        (revision, index): alone(backbone, adapter, text)
        for revision, adapter in zip(revisions, adapters, strict=True)
        for index, text in enumerate(TEXTS)
    }
    assert [answer.body for answer in answers if answer.status != 200] == []
    assert failed == 0
    for answer in answers:
        (result,) = answer.body["results"]
        scores = [item["score"] for item in result["scores"]]
        # float32 in a batch of another composition: the bound of tests/adapters/test_exactness.py
        assert scores == pytest.approx(expected[result["revision"], answer.text], abs=1e-5)
        if answer.alone:
            assert result["revision"] == revisions[answer.after_upload % 2]
    # Each upload was followed by one request at least that nothing else could have answered.
    assert {answer.after_upload for answer in answers if answer.alone} >= set(range(UPLOADS))
    assert len(answers) > 3 * UPLOADS


def alone(backbone: Backbone, adapter: Adapter, text: str) -> list[float]:
    """The scores of a text in a batch of its own, best first."""
    encoding = backbone.encoder.encode(text, max_length=adapter.spec.max_length)
    batch = backbone.pack([Row(encoding, RowShape.of(adapter.spec), 0)])
    classification = classify(backbone, batch, [prepare(adapter, backbone)])[0]
    return sorted(classification.scores.tolist(), reverse=True)


async def _load(url: str, files: list[bytes]) -> list[Answered]:
    """Every answer that the clients got while the files were uploaded in turn."""
    limits = httpx.Limits(max_connections=CLIENTS + 1, max_keepalive_connections=CLIENTS + 1)
    answers: list[Answered] = []
    # The last upload that has returned, and the last one that was begun.
    returned = begun = -1
    done = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:

        async def ask(index: int) -> None:
            before = returned
            body = {"adapter": "swapped", "inputs": TEXTS[index]}
            response = await client.post("/v1/predict", json=body)
            answers.append(
                Answered(index, before, begun == before, response.status_code, response.json())
            )

        async def keep_asking(number: int) -> None:
            turn = number
            while not done.is_set():
                await ask(turn % len(TEXTS))
                turn += 1
                await asyncio.sleep(PAUSE_SECONDS)

        clients = [asyncio.create_task(keep_asking(number)) for number in range(CLIENTS)]
        for turn in count():
            # Uploads may be much faster than requests: go on until both are enough.
            if turn >= UPLOADS and len(answers) > 3 * UPLOADS:
                break
            # Even numbers are the first file's; -1, as before the load, is the second's.
            begun = turn
            response = await client.put("/v1/adapters/swapped?force=true", content=files[turn % 2])
            assert response.status_code == 200, response.text
            returned = turn
            await ask(turn % len(TEXTS))
        done.set()
        await asyncio.gather(*clients)
    return answers


async def test_deleting_and_publishing_under_load_answers_200_or_404_and_nothing_else(
    tmp_path: Path, backbone: Backbone
) -> None:
    files = [serialize(make_adapter(backbone, seed=seed)) for seed in range(7)]
    # One slot for seven adapters: every request has to load what it needs, often from the disk.
    with serve(tmp_path, MAX_ACTIVE_ADAPTERS="1") as live:
        for index, content in enumerate(files):
            live.client.put(f"/v1/adapters/n{index}", content=content).raise_for_status()
        statuses = await _load_and_delete(live.url, files)
        assert live.metric("idspam_failures_total", reason="batch_error") == 0
        assert len(live.client.get("/v1/adapters").json()["adapters"]) == len(files)
    assert statuses == {200, 404}


async def _load_and_delete(url: str, files: list[bytes]) -> set[int]:
    statuses: set[int] = set()
    done = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:

        async def keep_asking(number: int) -> None:
            turn = number
            while not done.is_set():
                turn += 1
                body = {"adapter": f"n{turn % len(files)}", "inputs": "win"}
                statuses.add((await client.post("/v1/predict", json=body)).status_code)

        clients = [asyncio.create_task(keep_asking(number)) for number in range(8)]
        # At least five rounds, and on until a request has met a deleted adapter.
        for round_ in range(100):
            if round_ >= 5 and 404 in statuses:
                break
            for index, content in enumerate(files):
                path = f"/v1/adapters/n{index}"
                assert (await client.delete(path)).status_code == 204
                assert (await client.put(path, content=content)).status_code == 201
        done.set()
        await asyncio.gather(*clients)
    return statuses
