"""An engine with a real tiny backbone, whose device a test can hold, fail and count."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Answers, Backbone, Trunk
from adapters.format.files import Adapter, serialize
from adapters.format.store import AdapterStore
from adapters.packed.packing import PackedBatch
from adapters.packed.prompt import GeneratorWeights
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Completion, Entry, cost_of
from service.engine.observer import BatchReport, FailureReason, SilentObserver
from service.engine.settings import EngineSettings
from tests.support.tiny_models import make_adapter

# Float32 sums in another order: what batch-mates may change at most.
SAME = 1e-5


class Recorder(SilentObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.batches: list[BatchReport] = []
        self.failures: list[tuple[FailureReason, int]] = []
        self.waiting: list[int] = []

    def batch_done(self, report: BatchReport) -> None:
        self.batches.append(report)

    def waiting_tokens(self, tokens: int) -> None:
        self.waiting.append(tokens)

    def failed(self, reason: FailureReason, rows: int) -> None:
        self.failures.append((reason, rows))


class Device:
    """What a test does to the forward passes of the backbone that it is given to."""

    def __init__(self) -> None:
        self.gate = Event()
        self.gate.set()
        self.entered = Event()
        self.rows: list[int] = []
        self.waiting = 0
        self.both_wait = Event()
        self.most_rows: int | None = None
        self.error: Callable[[], BaseException] | None = None

    def before_forward(self, batch: PackedBatch) -> None:
        self.entered.set()
        self.waiting += 1
        if self.waiting == 2:
            self.both_wait.set()
        assert self.gate.wait(20)
        self.rows.append(len(batch.rows))
        if self.error is not None:
            raise self.error()
        if self.most_rows is not None and len(batch.rows) > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def hold(self) -> None:
        """The next forward pass waits; `entered` says that it does."""
        self.waiting = 0
        self.both_wait.clear()
        self.entered.clear()
        self.gate.clear()

    def free(self) -> None:
        self.gate.set()


class WatchedBackbone(Backbone):
    """A backbone that asks a `Device` first."""

    device_under_test: Device

    def forward(
        self,
        batch: PackedBatch,
        generators: Mapping[int, GeneratorWeights],
        *,
        trunk: Trunk | None = None,
    ) -> Answers:
        self.device_under_test.before_forward(batch)
        return super().forward(batch, generators, trunk=trunk)


class House:
    """An engine and everything that it stands on."""

    def __init__(self, root: Path, backbone: Backbone, **limits: Any) -> None:
        self.backbone = backbone
        self.device = Device()
        # The same backbone in another class: building a second one would take the model again.
        watched = WatchedBackbone.__new__(WatchedBackbone)
        watched.__dict__.update(backbone.__dict__)
        watched.device_under_test = self.device
        self.store = AdapterStore(root)
        self.recorder = Recorder()
        self.adapters: dict[str, Adapter] = {}
        self.keys: dict[str, AdapterKey] = {}
        self.settings = EngineSettings(**({"max_batch_tokens": 256} | limits))
        self.engine = LocalEngine(lambda: watched, self.store, self.settings, self.recorder)
        for seed, name in enumerate("abc"):
            self.add(
                name,
                make_adapter(
                    backbone,
                    seed=seed,
                    labels=("x", "y", "z", "w")[: seed + 2],
                    prompt_length=seed + 1,
                    insertion_layer=seed,
                ),
            )

    def add(self, name: str, adapter: Adapter) -> None:
        revision = self.store.put(name, serialize(adapter)).revision
        self.adapters[name], self.keys[name] = adapter, AdapterKey(name, revision)

    def entry(self, name: str, text: str) -> Entry:
        encoding = self.backbone.encoder.encode(text, max_length=self.backbone.max_tokens)
        cost = cost_of(encoding, self.adapters[name].spec)
        return Entry(self.keys[name], encoding, cost, explain=True)

    def entries(self, *pairs: tuple[str, str]) -> list[Entry]:
        return [self.entry(name, text) for name, text in pairs]

    async def held(self) -> asyncio.Task[Completion]:
        """A request that is on the device and stays there until `device.free()`."""
        self.device.hold()
        task = asyncio.create_task(self.engine.predict(self.entries(("a", "holds the device"))))
        assert await asyncio.to_thread(self.device.entered.wait, 10)
        return task

    async def waiting_entries(self, number: int) -> None:
        """Return once so many entries wait."""
        for _ in range(2000):
            if self.engine.health().details["waiting_entries"] == number:
                return
            await asyncio.sleep(0.001)
        pytest.fail(f"never {number} entries waiting: {self.engine.health()}")

    def agrees(self, entries: Sequence[Entry], completion: Completion) -> None:
        """Every answer is what its text alone gets."""
        assert len(completion.rows) == len(entries)
        for entry, row in zip(entries, completion.rows, strict=True):
            prepared = [prepare(self.adapters[entry.adapter.name], self.backbone)]
            batch = self.backbone.pack(rows_of(prepared, [(0, entry.encoding)]))
            (alone,) = classify(self.backbone, batch, prepared)
            np.testing.assert_allclose(row.scores, alone.scores, rtol=0, atol=SAME)
            assert row.token_weights is not None
            np.testing.assert_allclose(row.token_weights, alone.token_weights, rtol=0, atol=SAME)


def unbounded(backbone: Backbone) -> Adapter:
    """Finite weights whose scores are not: the head's products overflow."""
    adapter = make_adapter(backbone)
    tensors = dict(adapter.tensors)
    tensors["head.out.weight"] = torch.full_like(tensors["head.out.weight"], 3e38)
    return Adapter(adapter.spec, tensors)


@asynccontextmanager
async def open_house(root: Path, backbone: Backbone, **limits: Any) -> AsyncIterator[House]:
    """A house whose engine is started, and stopped in the end."""
    house = House(root, backbone, **limits)
    await house.engine.start()
    house.device.rows.clear()
    try:
        yield house
    finally:
        house.device.free()
        await house.engine.stop()


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; one that hangs fails."""
    asyncio.run(asyncio.wait_for(test, 30))


Opened = Callable[..., AbstractAsyncContextManager[House]]
