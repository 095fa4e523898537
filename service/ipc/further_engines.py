"""The engines of a host's other devices, as the first engine's process reaches them.

They connect to it like workers and get its catalog's updates. It asks them to load what is
published, and takes in what they have seen of trials and of drift.
"""

import asyncio
from collections.abc import Callable
from itertools import count
from typing import TypeAlias

from service.drift.monitor import DriftMonitor
from service.engine.interface import AdapterKey
from service.engine.others import OtherEngines
from service.engine.trials import TrialListener
from service.ipc.channel import Outbox
from service.ipc.protocol import (
    AskUsed,
    Counted,
    Forget,
    Message,
    Preload,
    Preloaded,
    Retire,
    TrialCompared,
    TrialDropped,
    TrialFailed,
    TrialRead,
    TrialUnreadable,
    UsedRevisions,
    pairs_of,
)

Answer: TypeAlias = Preloaded | UsedRevisions
Report: TypeAlias = (
    Counted | TrialRead | TrialFailed | TrialCompared | TrialDropped | TrialUnreadable
)


class FurtherEngines(OtherEngines):
    """Those that are connected; one that is given up is waited for no longer.

    Args:
        trials: told of what they have seen of names that try a second revision.
        monitor: counts the texts that they have answered.
    """

    def __init__(
        self, trials: TrialListener | None = None, monitor: DriftMonitor | None = None
    ) -> None:
        self._trials = trials or TrialListener()
        self._monitor = monitor
        # By the identity of their sockets.
        self._outboxes: dict[bytes, Outbox] = {}
        self._asked: dict[int, tuple[bytes, asyncio.Future[Answer | None]]] = {}
        self._numbers = count(1)

    def __len__(self) -> int:
        return len(self._outboxes)

    def add(self, identity: bytes, outbox: Outbox) -> None:
        self._outboxes[identity] = outbox

    def remove(self, identity: bytes) -> None:
        self._outboxes.pop(identity, None)
        for asked, answer in list(self._asked.values()):
            if asked == identity and not answer.done():
                answer.set_result(None)

    async def preload(self, key: AdapterKey) -> None:
        await self._ask(lambda number: Preload(number, key.name, key.revision))

    def retire(self, key: AdapterKey) -> None:
        for outbox in self._outboxes.values():
            outbox.send(Retire(key.name, key.revision))

    def forget(self, name: str) -> None:
        """The texts that were kept for a name were removed: more uncertain ones are wanted."""
        for outbox in self._outboxes.values():
            outbox.send(Forget(name))

    async def in_use(self, name: str) -> frozenset[str]:
        answers = await self._ask(lambda number: AskUsed(number, name))
        used = (item.revisions for item in answers if isinstance(item, UsedRevisions))
        return frozenset(revision for revisions in used for revision in revisions)

    def answered(self, answer: Answer) -> None:
        _, waiting = self._asked.get(answer.id, (b"", None))
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def reported(self, report: Report) -> None:
        trials = self._trials
        match report:
            case Counted():
                if self._monitor is not None:
                    for name, revision, bins in report.texts:
                        self._monitor.count(AdapterKey(name, revision), bins)
            case TrialRead(name, candidate, role, texts, seconds):
                trials.read(name, candidate, role, texts, seconds)
            case TrialFailed(name, candidate, revision, role, texts):
                trials.failed(name, candidate, revision, role, texts)
            case TrialCompared(name, candidate):
                trials.compared(name, candidate, pairs_of(report))
            case TrialDropped(name, candidate, texts, reason):
                trials.dropped(name, candidate, texts, reason)
            case TrialUnreadable(name, revision, reason):
                trials.unreadable(name, revision, reason)

    async def _ask(self, question: Callable[[int], Message]) -> list[Answer]:
        """The answers of those that are still there."""
        if not self._outboxes:
            return []
        asked: dict[int, asyncio.Future[Answer | None]] = {}
        loop = asyncio.get_running_loop()
        for identity, outbox in self._outboxes.items():
            number, answer = next(self._numbers), loop.create_future()
            asked[number] = answer
            self._asked[number] = identity, answer
            outbox.send(question(number))
        try:
            answers = await asyncio.gather(*asked.values())
        finally:
            for number in asked:
                self._asked.pop(number, None)
        return [answer for answer in answers if answer is not None]
