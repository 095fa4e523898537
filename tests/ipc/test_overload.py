"""More requests than the device can answer, against the real service, with and without workers.

The machine may be busy with other things, so the bounds are wide. `tests/engine/test_overload.py`
has narrow ones, on a clock of its own.
"""

import asyncio
import logging
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.open_loop import Answer, Connections, closed_loop, connections, open_loop
from tests.support.service_process import ReadyService, ready_service
from tests.support.tiny_models import make_adapter, save_backbone

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.slow, pytest.mark.alone]

WORDS = ("free", "win", "now", "my", "card", "is", "not", "good", "hello", "you", "call", "bad")
TIMEOUT = 1.0
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # As large as the default backbone: the device is what is overloaded, not the HTTP side.
    return save_backbone(tmp_path_factory.mktemp("backbone"), hidden_size=384, layers=6)


@pytest.fixture(scope="module", params=[0, 2], ids=["one process", "two workers"])
def service(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReadyService]:
    saved = load_backbone(str(folder), device="cpu")
    with ready_service(folder, tmp_path_factory.mktemp("s"), workers=request.param) as running:
        for seed, name in enumerate(NAMES):
            data = serialize(make_adapter(saved, seed=seed))
            response = httpx.put(f"{running.url}/v1/adapters/{name}", content=data, timeout=30)
            assert response.status_code == 201, response.text
        yield running


async def ask(
    sender: Connections, adapter: str, *, texts: int = 1, allowed: float = TIMEOUT
) -> Answer:
    inputs = [" ".join(random.choices(WORDS, k=30)) for _ in range(texts)]
    body = {"adapter": adapter, "inputs": inputs, "timeout_ms": round(allowed * 1000)}
    return await sender.post("/v1/predict", body)


def in_time(answers: list[Answer]) -> list[Answer]:
    return [item for item in answers if item.status == 200 and item.seconds <= TIMEOUT + 0.1]


async def test_three_times_the_capacity_is_answered_at_the_peak_or_refused_at_once(
    service: ReadyService,
) -> None:
    async with connections(service.url) as sender:

        async def peak(seconds: float) -> float:
            answers = await closed_loop(
                lambda: ask(sender, random.choice(NAMES), allowed=30), clients=24, seconds=seconds
            )
            assert {item.status for item in answers} == {200}
            return len(answers) / seconds

        rate = await peak(2)
        answers = await open_loop(
            lambda: ask(sender, random.choice(NAMES)), rate=3 * rate, seconds=3
        )
        statuses = Counter(item.status for item in answers)
        assert set(statuses) <= {200, 429, 504}
        refused = [item for item in answers if item.status == 429]
        assert len(refused) >= 0.2 * len(answers)
        assert all(1 <= int(item.headers["retry-after"]) <= 10 for item in refused)
        assert statistics.median(item.seconds for item in refused) < 0.25
        # What is refused does not cost the others their answers.
        assert statuses[504] <= 0.35 * statuses[200]

        until = time.monotonic() + 2
        while (await ask(sender, "a")).seconds > TIMEOUT / 2:
            assert time.monotonic() < until
        # Measured again: another test may have begun to use this machine.
        assert len(in_time(answers)) >= 0.5 * 3 * min(rate, await peak(1))
    assert service.metric("idspam_overload_refusals_total", reason="deadline") >= len(refused)
    assert service.metric("idspam_device_tokens_per_second") > 0


async def test_an_adapter_that_floods_does_not_take_the_others_turn(service: ReadyService) -> None:
    async with connections(service.url) as sender:

        async def flood() -> Answer:
            answer = await ask(sender, "a", texts=8)
            await asyncio.sleep(0.01)
            return answer

        flooding = asyncio.ensure_future(closed_loop(flood, clients=40, seconds=5))
        calm = await open_loop(lambda: ask(sender, "b"), rate=10, seconds=4.5)
        flooded = await flooding
    answered = sum(item.status == 200 for item in flooded)
    logger.info("flood: %d answered; others: %d of %d", answered, len(in_time(calm)), len(calm))
    assert any(item.status == 429 for item in flooded)
    # Two slow cores that other processes used as well were in time for 0.63 to 0.96 of them; where
    # batches starved it was a fifth at most.
    assert len(in_time(calm)) >= 0.6 * len(calm)
    assert answered > 0
