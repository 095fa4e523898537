"""Schedulers and entries for tests: costs and names, no texts."""

import numpy as np

from adapters.backbone.tokenizer import Encoding
from service.engine.interface import AdapterKey, Entry
from service.engine.scheduler import Scheduler, Waiting

ONE_TOKEN = np.zeros(1, dtype=np.int64)


def waiting(
    cost: int,
    *,
    name: str = "a",
    request: int = 0,
    since: float = 0.0,
    deadline: float | None = None,
) -> Waiting[int]:
    entry = Entry(AdapterKey(name, "0" * 64), Encoding(ONE_TOKEN, ONE_TOKEN, False), cost)
    return Waiting(entry, request, 0, since, deadline)


def scheduler(
    *, max_batch_tokens: int = 100, max_waiting_tokens: int = 10_000, max_adapters: int = 8
) -> Scheduler[int]:
    return Scheduler(
        max_batch_tokens=max_batch_tokens,
        max_waiting_tokens=max_waiting_tokens,
        max_adapters=max_adapters,
    )


def queue(target: Scheduler[int], *entries: Waiting[int]) -> None:
    target.admit(sum(item.entry.cost for item in entries))
    target.enqueue(entries)


def costs(batch: list[Waiting[int]]) -> list[int]:
    return [item.entry.cost for item in batch]
