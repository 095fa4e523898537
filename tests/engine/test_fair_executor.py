"""Threads that clients share: whose function runs next, and what becomes of those that do not."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from random import Random
from threading import Event

import pytest

from service.engine.fair_executor import FairExecutor
from service.engine.turns import Client

NOISY, QUIET = Client("noisy", 1.0), Client("quiet", 1.0)


@contextmanager
def one_busy_thread() -> Iterator[tuple[FairExecutor, ThreadPoolExecutor, Event]]:
    """What is submitted waits until the event is set."""
    free = Event()
    with ThreadPoolExecutor(1) as threads:
        try:
            threads.submit(free.wait, 10)
            yield FairExecutor(threads), threads, free
        finally:
            free.set()


def test_a_quiet_client_is_served_before_those_of_a_noisy_one() -> None:
    ran: list[str] = []
    with one_busy_thread() as (fair, _, free):
        for name in "abcdef":
            fair.submit(partial(ran.append, name), NOISY)
        last = fair.submit(partial(ran.append, "Q"), QUIET)
        free.set()
        last.result(10)
    assert "".join(ran) == "aQbcdef"


def test_what_a_quiet_client_waits_for_too_runs_in_its_turn() -> None:
    ran: list[str] = []
    with one_busy_thread() as (fair, _, free):
        futures = [fair.submit(partial(ran.append, name), NOISY) for name in "abcdef"]
        fair.advance(futures[4], QUIET)
        free.set()
        futures[5].result(10)
        # It has run already.
        fair.advance(futures[4], QUIET)
    assert "".join(ran) == "aebcdf"


def test_results_and_exceptions_go_to_their_own_futures() -> None:
    with one_busy_thread() as (fair, _, free):
        futures = [
            fair.submit(partial(int, text), client)
            for text, client in (("1", NOISY), ("x", NOISY), ("3", QUIET))
        ]
        free.set()
        assert (futures[0].result(10), futures[2].result(10)) == (1, 3)
        with pytest.raises(ValueError, match="invalid literal"):
            futures[1].result(10)


def test_a_cancelled_function_does_not_run_and_holds_up_no_other() -> None:
    ran: list[str] = []
    with one_busy_thread() as (fair, _, free):
        first, second, third = (fair.submit(partial(ran.append, n), NOISY) for n in "abc")
        assert second.cancel()
        free.set()
        third.result(10)
        assert not first.cancel()
    assert ran == ["a", "c"]


def test_what_waits_is_cancelled_when_the_threads_are_shut_down() -> None:
    with one_busy_thread() as (fair, _, _):
        futures = [fair.submit(lambda: None, client) for client in (NOISY, NOISY, QUIET)]
        fair.shutdown()
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(10)
        with pytest.raises(RuntimeError):
            fair.submit(lambda: None, QUIET)
        assert not fair._waiting


def test_each_function_runs_once_however_often_turns_change_while_threads_take_them() -> None:
    rng, ran = Random(1), Counter[int]()
    with ThreadPoolExecutor(3) as threads:
        fair = FairExecutor(threads)
        futures: list[Future[None]] = []
        for number in range(3000):
            client = Client(str(rng.randrange(5)), 1.0)
            futures.append(fair.submit(partial(ran.update, [number]), client))
            for _ in range(2):
                some = rng.choice(futures[-50:])
                fair.advance(some, Client(str(rng.randrange(9)), 1.0))
        for future in futures:
            future.result(10)
    assert ran == Counter(range(3000))
    assert not fair._waiting
