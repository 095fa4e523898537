"""Work in steps: in turns, until a deadline, and no longer than anybody waits for it."""

import asyncio
import time
from collections.abc import Generator, Iterator
from time import monotonic

import pytest

from service.errors import DeadlineExceeded, EngineUnavailable
from service.http.step_pool import _THREADS, StepPool


@pytest.fixture
def pool() -> Iterator[StepPool]:
    pool = StepPool()
    yield pool
    pool.close()


def sleeping(steps: int, seconds: float, taken: list[int]) -> Generator[None, None, int]:
    for index in range(steps):
        yield
        time.sleep(seconds)
        taken.append(index)
    return steps


async def test_the_value_of_the_steps_is_returned_and_their_error_raised(pool: StepPool) -> None:
    def failing() -> Generator[None, None, int]:
        yield
        raise LookupError

    assert await pool.run(sleeping(3, 0, []), deadline=monotonic() + 5) == 3
    assert await pool.run(sleeping(0, 0, []), deadline=monotonic() + 5) == 0
    with pytest.raises(LookupError):
        await pool.run(failing(), deadline=monotonic() + 5)


async def test_work_ends_at_its_deadline_and_no_step_of_it_begins_afterwards(
    pool: StepPool,
) -> None:
    taken: list[int] = []
    started = monotonic()
    with pytest.raises(DeadlineExceeded):
        await pool.run(sleeping(1000, 0.02, taken), deadline=started + 0.1)
    # All steps together would take 20 s.
    assert monotonic() - started < 5
    await asyncio.sleep(0.05)
    count = len(taken)
    await asyncio.sleep(0.1)
    assert len(taken) == count < 100


async def test_a_deadline_that_has_passed_runs_nothing_to_its_end(pool: StepPool) -> None:
    with pytest.raises(DeadlineExceeded):
        await pool.run(sleeping(1000, 0.01, []), deadline=monotonic() - 1)


async def test_short_work_does_not_wait_for_the_rest_of_long_work(pool: StepPool) -> None:
    taken: list[int] = []
    long = [
        asyncio.create_task(pool.run(sleeping(400, 0.01, taken), deadline=monotonic() + 30))
        for _ in range(8 * _THREADS)
    ]
    await asyncio.sleep(0.2)
    started = monotonic()
    await pool.run(sleeping(1, 0.01, []), deadline=monotonic() + 30)
    # Eight tasks a thread take turns of a step; the rest of one task takes four seconds.
    assert monotonic() - started < 2
    for task in long:
        task.cancel()
    await asyncio.gather(*long, return_exceptions=True)


async def test_closing_refuses_what_waits_and_what_has_further_steps(pool: StepPool) -> None:
    work = [
        asyncio.create_task(pool.run(sleeping(400, 0.05, []), deadline=monotonic() + 30))
        for _ in range(4 * _THREADS)
    ]
    left = asyncio.create_task(pool.run(sleeping(400, 0.05, []), deadline=monotonic() + 30))
    await asyncio.sleep(0.2)
    left.cancel()
    pool.close()
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {EngineUnavailable}
    with pytest.raises(asyncio.CancelledError):
        await left
    with pytest.raises(EngineUnavailable):
        await pool.run(sleeping(1, 0, []), deadline=monotonic() + 5)
