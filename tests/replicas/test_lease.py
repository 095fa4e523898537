"""The lease: how long a replica may answer, and that a lease which is over never comes back."""

from time import monotonic, sleep

from service.replicas.lease import Lease


def test_a_lease_is_held_from_its_first_renewal_until_its_time_is_over() -> None:
    lease = Lease(0.05)
    assert not lease.held
    assert not lease.is_over
    assert lease.renew(monotonic())
    sleep(0.06)
    assert lease.is_over


def test_a_lease_counts_from_when_its_round_began_and_never_shrinks() -> None:
    lease = Lease(10.0)
    now = monotonic()
    assert lease.renew(now - 3)
    assert lease.until == now + 7
    assert lease.renew(now - 5)
    assert lease.until == now + 7


def test_a_renewal_that_comes_too_late_renews_nothing() -> None:
    lease = Lease(0.05)
    assert not lease.renew(monotonic() - 1)
    assert lease.is_over
    assert not lease.renew(monotonic())
    assert not lease.held
    lease.begin()
    assert lease.renew(monotonic())


def test_a_lease_that_was_given_up_stays_given_up() -> None:
    lease = Lease(10.0)
    lease.renew(monotonic())
    lease.end()
    assert lease.is_over
    assert not lease.renew(monotonic())
