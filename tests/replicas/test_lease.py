"""The lease: how long a replica may answer, and that a lease which is over never comes back."""

import time
from collections.abc import Callable
from time import sleep

import pytest

from service.replicas.lease import Lease, lease_time


def test_a_lease_is_held_from_its_first_renewal_until_its_time_is_over() -> None:
    lease = Lease(0.05)
    assert not lease.held
    assert not lease.is_over
    assert lease.renew(lease_time())
    sleep(0.06)
    assert lease.is_over


def test_a_lease_counts_from_when_its_round_began_and_never_shrinks() -> None:
    lease = Lease(10.0)
    now = lease_time()
    assert lease.renew(now - 3)
    assert lease.until == now + 7
    assert lease.renew(now - 5)
    assert lease.until == now + 7


def test_a_renewal_that_comes_too_late_renews_nothing() -> None:
    lease = Lease(0.05)
    assert not lease.renew(lease_time() - 1)
    assert lease.is_over
    assert not lease.renew(lease_time())
    assert not lease.held
    lease.begin()
    assert lease.renew(lease_time())


def test_a_lease_that_was_given_up_stays_given_up() -> None:
    lease = Lease(10.0)
    lease.renew(lease_time())
    lease.end()
    assert lease.is_over
    assert not lease.renew(lease_time())


def test_a_lease_is_over_after_the_machine_was_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(10.0)
    assert lease.renew(lease_time())
    real: Callable[[int], float] = time.clock_gettime

    def after_an_hour(clock: int) -> float:
        return real(clock) + (3600.0 if clock == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(time, "clock_gettime", after_an_hour)
    assert lease.is_over
