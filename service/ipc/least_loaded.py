"""A worker's engines, one for each device: the least loaded one takes the request.

What is known of an engine's load is its last report, at most a fifth of a second old while requests
come, and what this worker has sent since. All workers get the same reports, so each takes it that
the others send as much as itself: else all would choose the same engine until its next report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from service.engine.interface import Completion, EngineInfo, Entry
from service.engine.load import Load, flow_of
from service.engine.observer import Observer
from service.errors import EngineUnavailable, Overloaded
from service.ipc.remote import RemoteEngine


@dataclass(slots=True, eq=False)
class _Choice:
    """An engine, and this worker's tokens that it has not answered yet: of requests, and of bulk.

    turn: when it was chosen last, in choices.
    """

    engine: RemoteEngine
    is_usable: Callable[[], bool]
    tokens: int = 0
    bulk_tokens: int = 0
    turn: int = 0


class LeastLoaded:
    """`service.engine.interface.Predictor` over several engines.

    Args:
        engines: each with a function that says whether it can be asked now. The first one has the
            catalog.
        observer: told of texts that fail because no engine answers.
    """

    def __init__(
        self, engines: Sequence[tuple[RemoteEngine, Callable[[], bool]]], observer: Observer
    ) -> None:
        self._first = engines[0][0]
        self._observer = observer
        self._choices = [_Choice(engine, is_usable) for engine, is_usable in engines]
        self._turns = 0
        self._info: tuple[EngineInfo, EngineInfo] | None = None

    @property
    def info(self) -> EngineInfo:
        known = self._first.info
        if self._info is None or self._info[0] is not known:
            self._info = known, replace(known, devices=len(self._choices))
        return self._info[1]

    @property
    def load(self) -> Load | None:
        """The first engine's, with the room of all."""
        load = self._first.load
        others = [choice.engine.load for choice in self._choices[1:]]
        limits = [other.limit for other in others if other is not None]
        return None if load is None else replace(load, limit=load.limit + sum(limits))

    def foresee(
        self, adapters: Sequence[str], *, timeout: float, client: str = "", weight: float = 1.0
    ) -> None:
        refusal: Overloaded | None = None
        for choice in self._choices:
            if not choice.is_usable():
                continue
            try:
                choice.engine.foresee(adapters, timeout=timeout, client=client, weight=weight)
            except Overloaded as error:
                refusal = _sooner(refusal, error)
            else:
                return
        if refusal is not None:
            raise refusal

    async def predict(
        self,
        entries: Sequence[Entry],
        *,
        deadline: float | None = None,
        client: str = "",
        weight: float = 1.0,
        bulk: bool = False,
        elsewhere: bool = False,
    ) -> Completion:
        """As of an engine. It is refused if all engines refuse it. If an engine is lost before it
        has answered, another one is asked, once: to ask again changes nothing."""
        tokens = sum([entry.cost for entry in entries])
        asked: list[_Choice] = []
        refusal: Overloaded | None = None
        lost: EngineUnavailable | None = None
        while (choice := self._choose(entries, deadline, client, asked, bulk=bulk)) is not None:
            asked.append(choice)
            more = elsewhere or self._is_any_left(asked)
            choice.tokens += 0 if bulk else tokens
            choice.bulk_tokens += tokens if bulk else 0
            try:
                return await choice.engine.predict(
                    entries,
                    deadline=deadline,
                    client=client,
                    weight=weight,
                    bulk=bulk,
                    elsewhere=more,
                )
            except Overloaded as error:
                refusal = _sooner(refusal, error)
            except EngineUnavailable as error:
                if lost is not None:
                    lost = error
                    break
                lost = error
            finally:
                choice.tokens -= 0 if bulk else tokens
                choice.bulk_tokens -= tokens if bulk else 0
        if refusal is not None:
            raise refusal
        self._observer.failed("unavailable", len(entries))
        raise lost or EngineUnavailable("no engine takes requests")

    async def drain(self) -> None:
        for choice in self._choices:
            await choice.engine.drain()

    @property
    def missing(self) -> int:
        """How many engines cannot be asked now."""
        return sum(not choice.is_usable() for choice in self._choices)

    def _is_any_left(self, asked: Sequence[_Choice]) -> bool:
        return any(choice not in asked and choice.is_usable() for choice in self._choices)

    def _choose(
        self,
        entries: Sequence[Entry],
        deadline: float | None,
        client: str,
        asked: Sequence[_Choice],
        *,
        bulk: bool,
    ) -> _Choice | None:
        """The engine that is expected to answer first; of equal ones that which was chosen less
        lately. None: there is none that was not asked."""
        timeout = None if deadline is None else deadline - monotonic()
        flow = flow_of(client, {entry.adapter.name for entry in entries}, timeout, bulk=bulk)
        best: _Choice | None = None
        least = (0.0, 0, 0)
        for choice in self._choices:
            if choice in asked or not choice.is_usable():
                continue
            waiting = choice.tokens + (choice.bulk_tokens if bulk else 0)
            cost = choice.engine.wait(flow), waiting, choice.turn
            if best is None or cost < least:
                best, least = choice, cost
        if best is not None:
            self._turns += 1
            best.turn = self._turns
        return best


def _sooner(one: Overloaded | None, other: Overloaded) -> Overloaded:
    return other if one is None or other.retry_after < one.retry_after else one
