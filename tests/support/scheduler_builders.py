"""Schedulers and queued entries for tests: costs and adapter names, no texts."""

from collections.abc import Sequence

import numpy as np

from adapters.tokenizer import Encoding
from service.engine.interface import AdapterKey, Entry
from service.engine.scheduler import QueuedEntry, Scheduler
from service.engine.settings import EngineSettings

ONE_TOKEN = np.zeros(1, dtype=np.int64)


def make_entry(
    cost: int, *, name: str = "a", since: float = 0.0, deadline: float | None = None
) -> QueuedEntry[int]:
    """An entry for the adapter `name`."""
    entry = Entry(AdapterKey(name, "0" * 64), Encoding(ONE_TOKEN, ONE_TOKEN, False), cost)
    return QueuedEntry(entry, 0, 0, since, deadline)


def make_scheduler(
    *, max_batch_tokens: int = 100, max_waiting_tokens: int = 10_000, max_adapters: int = 8
) -> Scheduler[int]:
    return Scheduler(
        EngineSettings(
            max_batch_tokens=max_batch_tokens,
            max_waiting_tokens=max_waiting_tokens,
            max_active_adapters=max_adapters,
        )
    )


def enqueue(scheduler: Scheduler[int], *entries: QueuedEntry[int]) -> None:
    """Admit and enqueue entries."""
    scheduler.admit(sum(costs(entries)))
    scheduler.enqueue(entries)


def costs(batch: Sequence[QueuedEntry[int]]) -> list[int]:
    return [queued.entry.cost for queued in batch]
