"""An engine with a real, tiny backbone, whose forward passes a test can hold, fail and count."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone, ForwardOutput, Trunk
from adapters.format.files import Adapter, serialize
from adapters.format.store import AdapterStore
from adapters.layers.tuning import BackboneTuning
from adapters.packed.packing import PackedBatch
from adapters.packed.prompt import GeneratorWeights
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Completion, Entry, cost_of
from service.engine.observer import BatchReport, FailureReason, Observer
from service.engine.settings import EngineSettings
from service.engine.trials import DropReason, Pair, Role, TrialListener
from tests.support.tiny_models import make_adapter

# Other rows in the batch may change a score by this much: float32 sums in another order.
SAME = 1e-5


class RecordingObserver(Observer):
    """Keeps the engine's events."""

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


class RecordingTrials(TrialListener):
    """Keeps what the engine reports of names that try a second revision."""

    def __init__(self) -> None:
        self.texts: Counter[Role] = Counter()
        self.failures: Counter[tuple[Role, str]] = Counter()
        self.pairs: list[Pair] = []
        self.drops: Counter[DropReason] = Counter()
        self.lost: list[AdapterKey] = []

    def read(self, *arguments: Any) -> None:
        _name, _candidate, role, texts, _seconds = arguments
        self.texts[role] += texts

    def failed(self, *arguments: Any) -> None:
        _name, _candidate, revision, role, texts = arguments
        self.failures[role, revision] += texts

    def compared(self, *arguments: Any) -> None:
        self.pairs += arguments[-1]

    def dropped(self, *arguments: Any) -> None:
        _name, _candidate, texts, reason = arguments
        self.drops[reason] += texts

    def unreadable(self, *arguments: Any) -> None:
        self.lost.append(AdapterKey(*arguments[:2]))


class DeviceControl:
    """Holds, fails and counts the forward passes of a `ControlledBackbone`.

    rows: the size of every pass. both_held: set when two passes are held at once. max_rows: larger
    passes run out of memory. error: makes what every pass raises. inspect: called with every batch.
    """

    def __init__(self) -> None:
        self.gate = Event()
        self.gate.set()
        self.entered = Event()
        self.rows: list[int] = []
        self.held = 0
        self.both_held = Event()
        self.max_rows: int | None = None
        self.error: Callable[[], BaseException] | None = None
        self.inspect: Callable[[PackedBatch], None] | None = None

    def before_forward(self, batch: PackedBatch) -> None:
        self.entered.set()
        self.held += 1
        if self.held == 2:
            self.both_held.set()
        assert self.gate.wait(20)
        self.rows.append(len(batch.rows))
        if self.inspect is not None:
            self.inspect(batch)
        if self.error is not None:
            raise self.error()
        if self.max_rows is not None and len(batch.rows) > self.max_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def hold(self) -> None:
        """Hold forward passes from now on; `entered` is set once one is held."""
        self.held = 0
        self.both_held.clear()
        self.entered.clear()
        self.gate.clear()

    def release(self) -> None:
        self.gate.set()


class ControlledBackbone(Backbone):
    """A backbone whose forward passes go through a `DeviceControl`."""

    control: DeviceControl

    def forward(
        self,
        batch: PackedBatch,
        generators: Mapping[int, GeneratorWeights],
        *,
        trunk: Trunk | None = None,
        tuning: BackboneTuning | None = None,
    ) -> ForwardOutput:
        self.control.before_forward(batch)
        return super().forward(batch, generators, trunk=trunk, tuning=tuning)


class EngineHarness:
    """An engine over a store of its own with the adapters `a`, `b` and `c`.

    Args:
        limits: fields of `EngineSettings`.
    """

    def __init__(self, root: Path, backbone: Backbone, **limits: Any) -> None:
        self.backbone = backbone
        self.device = DeviceControl()
        # The same model in another class: building a second backbone would load it again.
        controlled = ControlledBackbone.__new__(ControlledBackbone)
        controlled.__dict__.update(backbone.__dict__)
        controlled.control = self.device
        self.store = AdapterStore(root)
        self.recorder = RecordingObserver()
        self.trials = RecordingTrials()
        self.adapters: dict[str, Adapter] = {}
        self.keys: dict[str, AdapterKey] = {}
        self.settings = EngineSettings(**({"max_batch_tokens": 256} | limits))
        self.engine = LocalEngine(
            lambda: controlled, self.store, self.settings, self.recorder, self.trials
        )
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

    async def hold_device(self) -> asyncio.Task[Completion]:
        """Start a request that stays on the device until `device.release()`."""
        self.device.hold()
        task = asyncio.create_task(self.engine.predict(self.entries(("a", "holds the device"))))
        assert await asyncio.to_thread(self.device.entered.wait, 10)
        return task

    async def until_waiting(self, number: int) -> None:
        """Return once this many entries wait."""
        for _ in range(2000):
            if self.engine.health().details["waiting_entries"] == number:
                return
            await asyncio.sleep(0.001)
        pytest.fail(f"never {number} entries waiting: {self.engine.health()}")

    def assert_answered_as_alone(self, entries: Sequence[Entry], completion: Completion) -> None:
        """Every text has the answer that it gets in a batch of its own."""
        assert len(completion.rows) == len(entries)
        for entry, row in zip(entries, completion.rows, strict=True):
            prepared = [prepare(self.adapters[entry.adapter.name], self.backbone)]
            batch = self.backbone.pack(rows_of(prepared, [(0, entry.encoding)]))
            (alone,) = classify(self.backbone, batch, prepared)
            np.testing.assert_allclose(row.scores, alone.scores, rtol=0, atol=SAME)
            assert row.token_weights is not None
            np.testing.assert_allclose(row.token_weights, alone.token_weights, rtol=0, atol=SAME)


def adapter_with_infinite_scores(backbone: Backbone) -> Adapter:
    """Its weights are finite, but the head's products overflow."""
    adapter = make_adapter(backbone)
    tensors = dict(adapter.tensors)
    tensors["head.out.weight"] = torch.full_like(tensors["head.out.weight"], 3e38)
    return Adapter(adapter.spec, tensors)


@asynccontextmanager
async def open_engine(
    root: Path, backbone: Backbone, **limits: Any
) -> AsyncIterator[EngineHarness]:
    """A started engine; it is stopped at the end."""
    harness = EngineHarness(root, backbone, **limits)
    await harness.engine.start()
    harness.device.rows.clear()
    try:
        yield harness
    finally:
        harness.device.release()
        await harness.engine.stop()


# The fixture `open_engine`: it takes limits alone.
OpenEngine = Callable[..., AbstractAsyncContextManager[EngineHarness]]


@asynccontextmanager
async def running_engine(
    root: Path, backbone: Backbone, adapters: Mapping[str, Adapter], **limits: int
) -> AsyncIterator[EngineHarness]:
    """A started engine with these adapters. A test cannot hold its forward passes."""
    harness = EngineHarness(root, backbone, **limits)
    harness.engine = LocalEngine(
        lambda: backbone, harness.store, harness.settings, harness.recorder
    )
    for name, adapter in adapters.items():
        harness.add(name, adapter)
    await harness.engine.start()
    yield harness
    await harness.engine.stop()
