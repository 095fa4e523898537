"""How many replicas there should be: Ray Serve's custom autoscaling policy of this service.

It runs in Serve's controller, and imports neither Ray nor a model. Serve applies the bounds, delays
and factors of `autoscaling_config` to what it returns.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def replicas_needed(
    current: int,
    *,
    waiting: Sequence[float],
    done: Sequence[float],
    rates: Sequence[float],
    drain_seconds: float,
    busy: float,
) -> int:
    """Enough replicas to carry what is being done, and to clear what waits within a time.

    What waits is what makes replicas: it is zero until they are busy. What is being done keeps
    them: a queue that is empty because the replicas are enough is no reason to end one.

    Args:
        current: replicas now.
        waiting: tokens that wait, of each replica that reports.
        done: tokens per second that each of them computes.
        rates: tokens per second that each of them could compute, as measured; 0 if not yet.
        drain_seconds: in which what waits should be done.
        busy: the share of their rate that replicas should be used to.
    """
    measured = [rate for rate in rates if rate > 0]
    if not measured:
        return current
    rate = sum(measured) / len(measured)
    needed = (sum(done) + sum(waiting) / drain_seconds) / (busy * rate)
    return max(1, math.ceil(needed - 1e-9))


class WaitingTokens:
    """The policy, for `autoscaling_config.policy.policy_function`; its arguments are policy_kwargs.

    Args:
        drain_seconds, busy: as `replicas_needed`.
    """

    def __init__(self, drain_seconds: float = 2.0, busy: float = 0.7) -> None:
        if not (drain_seconds > 0 and 0 < busy <= 1):
            raise ValueError("policy_kwargs: drain_seconds must be above 0, busy from 0 to 1")
        self._drain_seconds, self._busy = drain_seconds, busy

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The replicas wanted, by what `Replica.record_autoscaling_stats` has reported."""
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}

        def of(name: str) -> list[float]:
            return list(metrics.get(name, {}).values())

        needed = replicas_needed(
            context.current_num_replicas,
            waiting=of("waiting_tokens"),
            done=of("tokens_per_second"),
            rates=of("device_tokens_per_second"),
            drain_seconds=self._drain_seconds,
            busy=self._busy,
        )
        return needed, {}
