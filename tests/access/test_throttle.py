"""Wrong keys by address: a burst, then a rate; memory bounded, and nobody locked out for long."""

from service.access.throttle import Throttle


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_address_may_fail_so_often_at_once_and_then_at_a_rate() -> None:
    clock = Clock()
    throttle = Throttle(per_minute=6, clock=clock)
    for _ in range(6):
        assert throttle.wait("192.0.2.1") == 0
        throttle.failed("192.0.2.1")
    assert throttle.wait("192.0.2.1") == 10
    assert throttle.wait("192.0.2.2") == 0
    clock.now += 10
    assert throttle.wait("192.0.2.1") == 0
    throttle.failed("192.0.2.1")
    assert throttle.wait("192.0.2.1") == 10
    clock.now += 60
    throttle.failed("192.0.2.1")
    assert throttle.wait("192.0.2.1") == 0


def test_a_flood_locks_an_address_out_no_longer_than_its_last_failure() -> None:
    clock = Clock()
    throttle = Throttle(per_minute=6, clock=clock)
    for _ in range(10_000):
        throttle.failed("192.0.2.1")
    assert throttle.wait("192.0.2.1") == 10


def test_the_table_forgets_who_failed_longest_ago() -> None:
    throttle = Throttle(per_minute=1, addresses=100)
    for number in range(10_000):
        throttle.failed(f"10.0.{number // 256}.{number % 256}")
    assert len(throttle) == 100
    assert throttle.wait("10.0.0.0") == 0
    assert throttle.wait("10.0.39.15") > 0


def test_addresses_of_one_ipv6_network_count_as_one() -> None:
    throttle = Throttle(per_minute=1)
    throttle.failed("2001:db8::1")
    assert throttle.wait("2001:db8::ffff:1") > 0
    assert throttle.wait("2001:db8:0:1::1") == 0
    throttle.failed("::ffff:192.0.2.1")
    assert throttle.wait("192.0.2.1") > 0
    throttle.failed("not an address")
    assert throttle.wait("not an address") > 0
