"""What the engines of a service report of their present state, as one: the supervisor shows it.

With several devices, what waits, what may wait and what they run at most are sums. So are the bytes
of a tier; its number of adapters is that of the engine with most, since all load the same ones.
"""

from collections.abc import Mapping
from typing import Any

from service.observability.metrics import Metrics


class EngineStates:
    """The last states of each engine, by its name; those of an engine that has ended are void."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._processes: dict[str, int] = {}
        # By engine: a method of `Observer`, with the value that tells its states apart.
        self._states: dict[str, dict[tuple[str, Any], Mapping[str, Any]]] = {}

    def set_process(self, engine: str, process: int | None) -> None:
        """The process of an engine from now on; None: it has ended."""
        if engine in self._processes:
            self._forget(engine)
        if process is not None:
            self._processes[engine] = process
            self._states[engine] = {}

    def engine_of(self, process: int) -> str | None:
        """The engine that this is the process of, if it is one."""
        for engine, number in self._processes.items():
            if number == process:
                return engine
        return None

    def report(self, engine: str, method: str, state: Any, arguments: Mapping[str, Any]) -> None:
        """A call of one of the methods that report states. state: tells its states apart."""
        self._states[engine][method, state] = arguments
        self._show(method, state)

    def _forget(self, engine: str) -> None:
        del self._processes[engine]
        left = self._states.pop(engine)
        if not self._processes:
            self._metrics.engine_gone()
            return
        self._metrics.builds_gone()
        for method, state in left:
            if method == "waiting_tokens":
                self._metrics.waiting_tokens(0, {engine: 0})
            if method == "drifted":
                self._metrics.drifted(state, 0, ())
            else:
                self._show(method, state)
        for states in self._states.values():
            if (built := states.get(("started", None))) is not None:
                self._metrics.started(**built)

    def _show(self, method: str, state: Any) -> None:
        """Show one state of all engines."""
        by_engine = {
            engine: states[method, state]
            for engine, states in self._states.items()
            if (method, state) in states
        }
        reports = by_engine.values()
        metrics = self._metrics
        match method:
            case "waiting_tokens":
                waiting = {engine: each["tokens"] for engine, each in by_engine.items()}
                metrics.waiting_tokens(sum(waiting.values()), waiting)
            case "waiting_limit":
                metrics.waiting_limit(sum(each["tokens"] for each in reports))
            case "pace":
                metrics.pace(
                    sum(each["tokens_per_second"] for each in reports),
                    min((each["estimated_wait"] for each in reports), default=0.0),
                )
            case "tier_size":
                metrics.tier_size(
                    state,
                    max((each["adapters"] for each in reports), default=0),
                    sum(each["bytes_held"] for each in reports),
                )
            case _:
                # Of one engine alone: the first one.
                for each in reports:
                    getattr(metrics, method)(**each)
