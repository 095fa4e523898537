"""How many replicas Ray's autoscaler wants, by what they report."""

from types import SimpleNamespace
from typing import Any

import pytest

from deploy.ray.autoscaling import WaitingTokens, replicas_needed

RATE = 1000.0


def needed(current: int, *, waiting: float = 0.0, done: float = 0.0, rate: float = RATE) -> int:
    """With the same report of every replica."""
    return replicas_needed(
        current,
        waiting=[waiting] * current,
        done=[done] * current,
        rates=[rate] * current,
        drain_seconds=2.0,
        busy=0.7,
    )


def test_what_waits_makes_replicas() -> None:
    # 700 tokens a second are what one replica should carry. 3000 that wait are 1500 a second.
    assert needed(1, waiting=3000, done=1000) == 4
    assert needed(2, waiting=3000, done=1000) == 8


def test_an_empty_queue_keeps_the_replicas_that_keep_it_empty() -> None:
    assert needed(4, done=650) == 4
    assert needed(4, done=300) == 2
    assert needed(4) == 1


def test_without_a_measured_rate_nothing_changes() -> None:
    assert needed(3, waiting=10_000, rate=0.0) == 3
    assert replicas_needed(2, waiting=[], done=[], rates=[], drain_seconds=2, busy=0.7) == 2


def test_replicas_settle_under_a_steady_load() -> None:
    """2,500 tokens a second on replicas that do 1,000 each: it ends at four, and stays."""
    replicas, waiting, seen = 1, 0.0, []
    for _ in range(60):
        capacity = replicas * RATE
        done = min(capacity, waiting + 2500)
        # As many as the engine lets wait: five seconds of work.
        waiting = min(5 * capacity, waiting + 2500 - done)
        replicas = min(16, needed(replicas, waiting=waiting / replicas, done=done / replicas))
        seen.append(replicas)
    assert seen[-30:] == [4] * 30
    assert max(seen) <= 8


def test_the_policy_reads_what_serve_has_gathered() -> None:
    metrics: dict[str, dict[str, float]] = {
        "waiting_tokens": {"a": 3000.0, "b": 0.0},
        "tokens_per_second": {"a": 1000.0, "b": 100.0},
        "device_tokens_per_second": {"a": 1000.0, "b": 1000.0},
    }
    policy = WaitingTokens(drain_seconds=2.0, busy=0.7)

    def wanted(aggregated: Any) -> int:
        context = SimpleNamespace(current_num_replicas=2, aggregated_metrics=aggregated)
        return policy(context)[0]

    assert wanted(metrics) == 4
    assert wanted(None) == 2


@pytest.mark.parametrize("bad", [{"drain_seconds": 0}, {"busy": 0}, {"busy": 1.5}])
def test_bad_arguments_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="drain_seconds"):
        WaitingTokens(**bad)
