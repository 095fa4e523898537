"""Threads that clients share: whose function runs next, and what becomes of those that do not."""

import asyncio
import gc
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from threading import Event
from weakref import ref

import pytest

from service.engine.fair_executor import FairExecutor
from service.engine.turns import Client

NOISY, QUIET = Client("noisy", 1.0), Client("quiet", 1.0)


@contextmanager
def one_busy_thread() -> Iterator[tuple[FairExecutor, Event]]:
    """What is submitted waits until the event is set."""
    begun, free = Event(), Event()

    def hold() -> None:
        begun.set()
        assert free.wait(10)

    fair = FairExecutor(1, name="busy")
    try:
        fair.submit(hold, Client("holder", 1.0))
        assert begun.wait(10)
        yield fair, free
    finally:
        free.set()
        fair.shutdown()


async def test_a_quiet_client_is_served_before_those_of_a_noisy_one() -> None:
    ran: list[str] = []
    with one_busy_thread() as (fair, free):
        for name in "abcdef":
            fair.submit(partial(ran.append, name), NOISY)
        last = fair.submit(partial(ran.append, "Q"), QUIET)
        rest = fair.submit(partial(ran.append, "g"), NOISY)
        free.set()
        await asyncio.wait_for(asyncio.gather(last, rest), 10)
    assert "".join(ran) == "aQbcdefg"


async def test_what_a_quiet_client_waits_for_too_runs_in_its_turn() -> None:
    ran: list[str] = []
    with one_busy_thread() as (fair, free):
        futures = [fair.submit(partial(ran.append, name), NOISY) for name in "abcdef"]
        fair.advance(futures[4], QUIET)
        free.set()
        await asyncio.wait_for(futures[5], 10)
        # It has run already.
        fair.advance(futures[4], QUIET)
    assert "".join(ran) == "aebcdf"


async def test_results_and_exceptions_go_to_their_own_futures() -> None:
    with one_busy_thread() as (fair, free):
        futures = [
            fair.submit(partial(int, text), client)
            for text, client in (("1", NOISY), ("x", NOISY), ("3", QUIET))
        ]
        free.set()
        assert await asyncio.wait_for(futures[0], 10) == 1
        assert await asyncio.wait_for(futures[2], 10) == 3
        with pytest.raises(ValueError, match="invalid literal"):
            await asyncio.wait_for(futures[1], 10)


@pytest.mark.parametrize("by_its_future", [False, True])
async def test_a_cancelled_function_does_not_run_and_holds_up_no_other(by_its_future: bool) -> None:
    ran: list[str] = []
    with one_busy_thread() as (fair, free):
        first, second, third = (fair.submit(partial(ran.append, n), NOISY) for n in "abc")
        assert second.cancel() if by_its_future else fair.cancel(second)
        free.set()
        await asyncio.wait_for(third, 10)
        assert second.cancelled()
        assert not fair.cancel(first)
    assert ran == ["a", "c"]


async def test_a_function_that_a_thread_has_taken_cannot_be_cancelled() -> None:
    with one_busy_thread() as (fair, free):
        begun, go_on = Event(), Event()

        def taken() -> bool:
            begun.set()
            return go_on.wait(10)

        future = fair.submit(taken, QUIET)
        free.set()
        assert await asyncio.to_thread(begun.wait, 10)
        assert not fair.cancel(future)
        go_on.set()
        assert await asyncio.wait_for(future, 10)


async def test_what_waits_is_cancelled_at_the_shutdown_and_the_threads_end() -> None:
    with one_busy_thread() as (fair, free):
        futures = [fair.submit(lambda: None, client) for client in (NOISY, NOISY, QUIET)]
        fair.shutdown()
        assert all(future.cancelled() for future in futures)
        with pytest.raises(RuntimeError):
            fair.submit(lambda: None, QUIET)
        assert not fair._waiting
        free.set()
        for thread in fair._threads:
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()


async def test_threads_end_with_an_executor_that_nobody_has_shut_down() -> None:
    fair = FairExecutor(2, name="forgotten")
    await fair.submit(lambda: None, QUIET)
    gone, threads = ref(fair), fair._threads
    assert all(thread.is_alive() for thread in threads)
    del fair
    gc.collect()
    assert gone() is None
    assert not any(thread.is_alive() for thread in threads)


async def test_an_error_leaves_no_circle_for_the_collector() -> None:
    class Large:
        pass

    def fail(large: Large) -> None:
        raise ValueError(str(large))

    fair = FairExecutor(1, name="failing")
    large = Large()
    gone = ref(large)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="Large"):
            await fair.submit(partial(fail, large), QUIET)
        del large
        await fair.submit(lambda: None, QUIET)
        assert gone() is None
    finally:
        gc.enable()
        fair.shutdown()


async def test_whatever_a_function_raises_its_future_ends() -> None:
    fair = FairExecutor(1, name="odd")
    for error in (StopIteration, SystemExit, asyncio.CancelledError):

        def fail(error: type[BaseException] = error) -> None:
            raise error

        future = fair.submit(fail, QUIET)
        await asyncio.wait([future], timeout=10)
        assert future.done()
        assert future.cancelled() or future.exception() is not None
    assert await asyncio.wait_for(fair.submit(lambda: 1, QUIET), 10) == 1
    fair.shutdown()


async def test_threads_that_could_not_start_are_started_with_the_next_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fair, start = FairExecutor(2, name="late"), threading.Thread.start
    full = [True, False]

    def refuse(thread: threading.Thread) -> None:
        if full and full.pop():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        fair.submit(lambda: 1, QUIET)
    assert await asyncio.wait_for(fair.submit(lambda: 2, QUIET), 10) == 2
    fair.shutdown()


async def test_each_thread_begins_as_it_is_told() -> None:
    begun: list[str] = []
    fair = FairExecutor(
        2, name="named", begin=lambda: begun.append(threading.current_thread().name)
    )
    assert not begun
    await fair.submit(lambda: None, QUIET)
    fair.shutdown()
    for thread in fair._threads:
        await asyncio.to_thread(thread.join, 10)
    assert sorted(begun) == ["named_0", "named_1"]


def test_a_process_ends_although_a_function_hangs() -> None:
    code = (
        "import asyncio, time\n"
        "from service.engine.fair_executor import FairExecutor\n"
        "from service.engine.turns import NOBODY\n"
        "async def main():\n"
        "    fair = FairExecutor(1, name='hanging')\n"
        "    fair.submit(lambda: time.sleep(60), NOBODY)\n"
        "    await asyncio.sleep(0.1)\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=20).returncode == 0


async def test_each_function_runs_once_however_often_turns_change_while_threads_take_them() -> None:
    rng, ran = Random(1), Counter[int]()
    fair = FairExecutor(3, name="many")
    futures: list[asyncio.Future[None]] = []
    for number in range(3000):
        client = Client(str(rng.randrange(5)), 1.0)
        futures.append(fair.submit(partial(ran.update, [number]), client))
        for _ in range(2):
            some = rng.choice(futures[-50:])
            fair.advance(some, Client(str(rng.randrange(9)), 1.0))
    await asyncio.wait_for(asyncio.gather(*futures), 10)
    fair.shutdown()
    assert ran == Counter(range(3000))
    assert not fair._waiting
