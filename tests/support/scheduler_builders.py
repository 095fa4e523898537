"""Schedulers and queued entries for tests: costs and adapter names, no texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapters.tokenizer import Encoding
from service.engine.interface import AdapterKey, Entry
from service.engine.scheduler import QueuedEntry, Scheduler, Ticket
from service.engine.settings import EngineSettings

ONE_TOKEN = np.zeros(1, dtype=np.int64)


def make_entry(cost: int, *, name: str = "a") -> Entry:
    """An entry for the adapter `name`."""
    return Entry(AdapterKey(name, "0" * 64), Encoding(ONE_TOKEN, ONE_TOKEN, False), cost)


def make_scheduler(
    *,
    max_batch_tokens: int = 100,
    max_waiting_tokens: int | None = 10_000,
    max_adapters: int = 8,
    lanes: int = 1,
    adapter_weights: Mapping[str, float] | None = None,
) -> Scheduler[int]:
    return Scheduler(
        EngineSettings(
            max_batch_tokens=max_batch_tokens,
            max_waiting_tokens=max_waiting_tokens,
            max_active_adapters=max_adapters,
            lanes=lanes,
            adapter_weights=adapter_weights or {},
        )
    )


def submit(
    scheduler: Scheduler[int], *entries: Entry, now: float = 0.0, **request: Any
) -> list[QueuedEntry[int]]:
    """Admit and enqueue one request; returns its entries in the queue.

    Args:
        request: as of `Scheduler.admit`: deadline, client, weight.
    """
    return queue(scheduler, scheduler.admit(entries, now=now, **request), entries)


def queue(
    scheduler: Scheduler[int], ticket: Ticket[int], entries: Sequence[Entry]
) -> list[QueuedEntry[int]]:
    """Enqueue the entries of an admitted request."""
    queued = [QueuedEntry(entry, 0, index, ticket) for index, entry in enumerate(entries)]
    scheduler.enqueue(ticket, queued)
    return queued


def submit_each(scheduler: Scheduler[int], *costs: int, **request: Any) -> list[QueuedEntry[int]]:
    """One request for each cost."""
    return [submit(scheduler, make_entry(cost), **request)[0] for cost in costs]


def costs(batch: Sequence[QueuedEntry[int]]) -> list[int]:
    return [queued.entry.cost for queued in batch]
