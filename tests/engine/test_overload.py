"""The scheduler under any load, against a simulated device and clock: `tests.support.overload`."""

import pytest

from tests.support.overload import SimulatedDevice, Traffic, simulate

# Two lanes, as the default on two cores: a full batch takes 0.21 s.
CPU = SimulatedDevice()
GPU = SimulatedDevice(lanes=1, budget=16384, fixed=0.001, per_token=3.7e-7, answering=0.001)
TOKENS = (40, 80, 160)
TIMEOUTS = (0.4, 1.0, 4.0, 30.0, None)


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.8, 1.2, 3.0, 10.0])
@pytest.mark.parametrize(
    ("timeout", "least"), [(0.23, 0.93), (0.5, 0.96), (1.0, 0.97), (30.0, 0.97)]
)
def test_goodput_stays_at_the_peak_under_any_load(
    timeout: float, least: float, load: float
) -> None:
    """Where a deadline is hardly longer than a full batch, batches are smaller, which costs some
    of the rate."""
    outcome = simulate(CPU, [Traffic(load, (timeout,), tokens=TOKENS)], seconds=10)
    total = outcome.total()
    assert outcome.goodput >= least
    # Nearly all that cannot be served is refused at once; hardly anything runs in vain.
    assert total.expired + total.late <= 0.03 * total.offered
    assert outcome.wasted <= 0.03 * total.tokens


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("load", [1.2, 10.0])
def test_the_same_with_other_numbers_of_lanes(lanes: int, load: float) -> None:
    device = SimulatedDevice(lanes=lanes)
    assert simulate(device, [Traffic(load, tokens=TOKENS)], seconds=10).goodput >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("load", [1.2, 3.0])
def test_the_same_on_a_gpu_with_a_hundred_adapters(load: float) -> None:
    traffic = Traffic(load, (0.2,), tokens=(500, 1000), adapters=[f"a{i}" for i in range(100)])
    outcome = simulate(GPU, [traffic], seconds=2.5, settle=0.5)
    assert outcome.goodput >= 0.95
    assert outcome.mean_tokens >= 0.8 * GPU.budget


def test_the_same_if_some_batches_take_four_times_as_long() -> None:
    device = SimulatedDevice(hiccup=4.0)
    assert simulate(device, [Traffic(3.0, tokens=TOKENS)], seconds=23).goodput >= 0.93


def test_the_same_without_a_measurement_at_the_start() -> None:
    outcome = simulate(CPU, [Traffic(3.0, tokens=TOKENS)], seconds=13, measured=False)
    assert outcome.goodput >= 0.97


# At low loads the large requests that no device could finish in 0.4 s are missing.
@pytest.mark.parametrize(("load", "least"), [(0.8, 0.8), (1.2, 0.8), (3.0, 0.95), (10.0, 0.95)])
def test_timeouts_and_sizes_of_all_kinds_are_served_side_by_side(load: float, least: float) -> None:
    """A queue of patient requests does not keep out impatient ones, nor the other way round."""
    traffic = Traffic(load, TIMEOUTS, texts=(1, 1, 1, 1, 8, 40), tokens=TOKENS)
    outcome = simulate(CPU, [traffic], seconds=23)
    assert outcome.goodput >= least
    total = outcome.total()
    for timeout in TIMEOUTS:
        # A request of 40 texts takes 0.2 s of the device: some of those are refused at 0.4 s.
        of = outcome.total(timeout=timeout)
        assert of.good / of.offered >= 0.25 * total.good / total.offered
        assert of.expired + of.late <= 0.03 * of.offered + 1


def test_an_adapter_that_floods_does_not_slow_another() -> None:
    flood = Traffic(10.0, adapters=("flood",), tokens=TOKENS)
    calm = Traffic(0.2, adapters=("calm",), tokens=TOKENS)
    alone = simulate(CPU, [calm], seconds=10).total()
    outcome = simulate(CPU, [flood, calm], seconds=10)
    of = outcome.total(adapter="calm")
    assert of.good >= 0.95 * of.offered
    # It waits for the batches that run, but not for the flood.
    assert of.slowest <= alone.slowest + 2.5 * CPU.seconds_of_a_full_batch
    assert outcome.goodput >= 0.95


def test_a_client_that_floods_does_not_slow_another_with_the_same_adapters() -> None:
    flood = Traffic(10.0, client="flood", tokens=TOKENS)
    calm = Traffic(0.4, client="calm", tokens=TOKENS)
    outcome = simulate(CPU, [flood, calm], seconds=10)
    of = outcome.total(client="calm")
    assert of.good >= 0.95 * of.offered
    assert outcome.goodput >= 0.96


def test_clients_that_all_ask_for_too_much_get_shares_by_weight() -> None:
    traffic = [
        Traffic(4.0, (5.0,), client=name, weight=weight, tokens=TOKENS)
        for name, weight in (("heavy", 3.0), ("light", 1.0))
    ]
    outcome = simulate(CPU, traffic, seconds=24, settle=8)
    ratio = outcome.total(client="heavy").tokens / outcome.total(client="light").tokens
    assert ratio == pytest.approx(3.0, rel=0.15)
    assert outcome.goodput >= 0.97


def test_adapters_get_shares_by_weight_within_a_client() -> None:
    traffic = [Traffic(3.0, (None,), adapters=(name,), tokens=TOKENS) for name in "abc"]
    outcome = simulate(CPU, traffic, seconds=24, settle=8, adapter_weights={"a": 2.0, "b": 0.5})
    tokens = {name: outcome.total(adapter=name).tokens for name in "abc"}
    assert tokens["a"] / tokens["c"] == pytest.approx(2.0, rel=0.15)
    assert tokens["b"] / tokens["c"] == pytest.approx(0.5, rel=0.15)


@pytest.mark.slow
def test_a_client_with_many_adapters_has_no_larger_share() -> None:
    many = Traffic(4.0, (5.0,), client="many", adapters=[f"a{i}" for i in range(50)], tokens=TOKENS)
    one = Traffic(4.0, (5.0,), client="one", adapters=("a1",), tokens=TOKENS)
    outcome = simulate(CPU, [many, one], seconds=24, settle=8)
    ratio = outcome.total(client="many").tokens / outcome.total(client="one").tokens
    assert ratio == pytest.approx(1.0, rel=0.15)


def test_requests_of_hundreds_of_texts_do_not_slow_single_texts_and_are_answered() -> None:
    bulk = Traffic(1.5, (30.0,), client="bulk", texts=(100,), tokens=TOKENS)
    quick = Traffic(0.3, (0.8,), client="quick", tokens=TOKENS)
    outcome = simulate(CPU, [bulk, quick], seconds=23)
    of = outcome.total(client="quick")
    assert of.good >= 0.95 * of.offered
    assert outcome.total(client="bulk").good >= 10


def test_after_a_flood_everything_is_as_before() -> None:
    flood = Traffic(10.0, begins=5.0, ends=10.0, tokens=TOKENS)
    calm = Traffic(0.3, client="calm", begins=10.5, tokens=TOKENS)
    outcome = simulate(CPU, [flood, calm], seconds=16, settle=10.5)
    of = outcome.total(client="calm")
    assert of.good == pytest.approx(of.offered, abs=0.02 * of.offered)
    assert of.slowest <= 2.5 * CPU.seconds_of_a_full_batch
