"""A request on its way through the engine. Knows no queue and no device."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.engine.interface import Completion, Entry, RowResult
from service.engine.residency import Lease
from service.engine.scheduler import Waiting
from service.errors import ServiceError


@dataclass(slots=True, eq=False)
class Request:
    """Entries that are answered together; everything but `lease` belongs to the event loop.

    left: entries not yet answered, failed or dropped. admitted, deadline: of `time.monotonic`.
    lease: their adapters; set before the entries are queued, never changed while one may run.
    """

    entries: Sequence[Entry]
    deadline: float | None
    admitted: float
    answer: asyncio.Future[Completion]
    tokens: int = field(init=False)
    left: int = field(init=False)
    rows: list[RowResult | None] = field(init=False)
    waiting: list[Waiting["Request"]] = field(init=False, default_factory=list)
    lease: Lease | None = None
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = sum(entry.cost for entry in self.entries)
        self.left = len(self.entries)
        self.rows = [None] * len(self.entries)

    def fail(self, error: ServiceError) -> None:
        """Fail the request as a whole; only the first failure counts."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def note(self, queue_seconds: float, inference_seconds: float) -> None:
        """Some of its entries waited and ran so long; the slowest count."""
        self.queue_seconds = max(self.queue_seconds, queue_seconds)
        self.inference_seconds = max(self.inference_seconds, inference_seconds)

    def settle(self, entries: int) -> bool:
        """So many more entries are through, whatever became of them; says whether all are."""
        self.left -= entries
        assert self.left >= 0
        if self.left == 0 and not self.answer.done():
            rows = tuple([row for row in self.rows if row is not None])
            assert len(rows) == len(self.entries)
            completion = Completion(rows, self.queue_seconds, self.inference_seconds)
            self.answer.set_result(completion)
        return self.left == 0

    def give_up(self) -> None:
        """Nobody waits for the answer any more."""
        if not self.answer.cancel() and not self.answer.cancelled():
            # Looked at once, so that asyncio does not report it as never retrieved.
            self.answer.exception()
