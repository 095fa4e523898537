"""The engine on a CUDA device: slots, graphs and tiers; every text is answered as if alone.

bfloat16 bound: eight bits of mantissa over three wide random layers. The answers to one text differ
between two batches because the kernels tile them differently.
"""

import asyncio
import gc
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, all_finite, serialize
from adapters.slots import bank
from adapters.slots.batch import InsertionPoint, Signature, Source
from adapters.slots.staging import Staging
from service.engine import images
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry
from service.engine.observer import BatchReport, ImageEvent, Observer
from service.engine.runners.base import BatchRow
from service.engine.runners.slotted import SlottedRunner
from tests.support.engine_harness import EngineHarness, running_engine
from tests.support.tiny_models import attention_of, make_adapter, make_backbone

# A test that hangs fails.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]

BFLOAT16_BOUND = 0.05
# Large enough for graphs of several sizes.
LIMITS = {"max_batch_tokens": 4096, "max_active_adapters": 16}


def on_device(dtype: torch.dtype = torch.bfloat16) -> Backbone:
    """A backbone whose heads are wide enough for the flash kernels."""
    return make_backbone(hidden_size=64).to(device="cuda", dtype=dtype)


@asynccontextmanager
async def open_engine(
    root: Path, backbone: Backbone, **limits: int
) -> AsyncIterator[EngineHarness]:
    """A started engine whose forward passes are not held by a test."""
    async with running_engine(root, backbone, {}, **(LIMITS | limits)) as harness:
        yield harness


def entries_of(harness: EngineHarness, number: int) -> list[Entry]:
    pairs = [("abc"[index % 3], "win now " * (index * 7 % 40)) for index in range(number)]
    return harness.entries(*pairs)


def alone(harness: EngineHarness, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    prepared = [prepare(harness.adapters[entry.adapter.name], harness.backbone)]
    batch = harness.backbone.pack(rows_of(prepared, [(0, entry.encoding)]))
    (answer,) = classify(harness.backbone, batch, prepared)
    return answer.scores, answer.token_weights


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, BFLOAT16_BOUND)]
)
async def test_every_text_is_answered_as_alone(
    tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    async with open_engine(tmp_path, on_device(dtype)) as harness:
        entries = [structs.replace(entry, explain=True) for entry in entries_of(harness, 40)]
        completion = await harness.engine.predict(entries)
        for entry, row in zip(entries, completion.rows, strict=True):
            scores, weights = alone(harness, entry)
            assert row.token_weights is not None
            np.testing.assert_allclose(row.scores, scores, rtol=0, atol=bound)
            np.testing.assert_allclose(row.token_weights, weights, rtol=0, atol=bound)


async def test_a_batch_of_common_adapters_is_one_graph_launch_and_agrees_with_an_eager_one(
    tmp_path: Path,
) -> None:
    backbone = on_device()
    async with open_engine(tmp_path, backbone) as harness:
        usual = make_adapter(
            backbone,
            seed=9,
            prompt_length=10,
            insertion_layer=backbone.layers // 2,
            generator_input="hidden",
        )
        # The same function, whose bottleneck no graph holds.
        wide = _widened(usual, 80)
        harness.add("usual", usual)
        harness.add("wide", wide)
        for number in (1, 3, 30):
            texts = ["win now " * (index * 5 % 50) for index in range(number)]
            answers = []
            for name in ("usual", "wide"):
                entries = harness.entries(*((name, text) for text in texts))
                before = len(harness.recorder.batches)
                rows = (await harness.engine.predict(entries)).rows
                answers.append(rows)
                (report,) = harness.recorder.batches[before:]
                assert report.graphs == (name == "usual")
            for one, other in zip(*answers, strict=True):
                np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=BFLOAT16_BOUND)


async def test_images_answer_as_files_to_the_bit_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So little is pinned that nothing fits into it.
    monkeypatch.setattr(bank, "STAGED_BYTES", 256)
    backbone, answers, counts = on_device(), [], []
    for limit in (None, 2**30, 2**30):
        recorder = ImageRecorder()
        harness = EngineHarness(tmp_path, backbone, max_image_bytes=limit, **LIMITS)
        engine = LocalEngine(lambda: backbone, harness.store, harness.settings, recorder)
        await engine.start()
        answers.append((await engine.predict(entries_of(harness, 30))).rows)
        if limit is not None:
            await asyncio.wait_for(recorder.three.wait(), 20)
        await engine.stop()
        counts.append(dict(recorder.events))
    assert counts == [{}, {"made": 3}, {"used": 3}]
    for rows in answers[1:]:
        for one, other in zip(answers[0], rows, strict=True):
            np.testing.assert_array_equal(one.scores, other.scores)


class ImageRecorder(Observer):
    """Counts what happens to images."""

    def __init__(self) -> None:
        self.events: Counter[ImageEvent] = Counter()
        self.three = asyncio.Event()

    def adapter_image(self, event: ImageEvent) -> None:
        self.events[event] += 1
        if self.events.total() == 3:
            self.three.set()


async def test_during_swaps_every_request_is_answered_by_its_revision_and_memory_stays_flat(
    tmp_path: Path,
) -> None:
    backbone = on_device()
    async with open_engine(tmp_path, backbone, max_active_adapters=4) as harness:
        versions = [make_adapter(backbone, seed=seed) for seed in range(6)]
        files = [serialize(version) for version in versions]
        file = tmp_path / "file"
        encoding = backbone.encoder.encode("hello you", max_length=64)
        revisions, expected = [], []
        for data, version in zip(files, versions, strict=True):
            revisions.append(harness.store.put("swapped", data).revision)
            prepared = [prepare(version, backbone)]
            batch = backbone.pack(rows_of(prepared, [(0, encoding)]))
            expected.append(classify(backbone, batch, prepared)[0].scores)
        done = False

        async def ask() -> None:
            while not done:
                revision = harness.store.current("swapped")
                entry = Entry(AdapterKey("swapped", revision), encoding, len(encoding) + 3)
                (row,) = (await harness.engine.predict([entry])).rows
                scores = expected[revisions.index(revision)]
                np.testing.assert_allclose(row.scores, scores, rtol=0, atol=BFLOAT16_BOUND)

        clients = [asyncio.create_task(ask()) for _ in range(16)]
        used = []
        for number in range(300):
            file.write_bytes(files[number % 6])
            await harness.engine.check(file)
            await asyncio.to_thread(harness.store.put, "swapped", files[number % 6])
            if number in (99, 299):
                gc.collect()
                used.append(torch.cuda.memory_allocated())
        done = True
        await asyncio.gather(*clients)
        assert used[1] <= used[0] + 2**20
        assert harness.recorder.failures == []


def test_answers_are_dropped_and_files_checked_while_graphs_are_captured() -> None:
    # Page-locked memory that another thread frees during a capture would end it, and the engine.
    backbone = on_device()
    runner = SlottedRunner(backbone, slots=4, max_tokens=1024)
    adapters = [make_adapter(backbone, seed=seed) for seed in range(4)]
    loaded = runner.load([(slot, runner.prepare(item)) for slot, item in enumerate(adapters)])
    text = backbone.encoder.encode("hello you", max_length=64)
    answers: deque[object] = deque()
    ended = threading.Event()

    def drop_and_check() -> None:
        # On a stream of its own, as the thread that checks an upload.
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            values = torch.ones(64, device=backbone.device)
            while not ended.is_set():
                if answers:
                    answers.popleft()
                assert all_finite(values)

    (point,) = {adapter.spec.prompt.layer for adapter in adapters if adapter.spec.prompt}
    signature = Signature((InsertionPoint(point, (Source.HIDDEN,)),), mean=False)
    assert runner._graphs is not None
    # The lane's stream is this thread's only within the block.
    with ThreadPoolExecutor(max_workers=1) as pool, torch.cuda.stream(torch.cuda.Stream()):
        runner.enter_lane()
        beside = pool.submit(drop_and_check)
        try:
            for _ in range(3):
                for _ in range(50):
                    rows = [BatchRow(text, loaded[index % 4]) for index in range(8)]
                    answers.append(runner.launch(rows).wait())
                runner._graphs.capture_all(signature)
        finally:
            ended.set()
        beside.result()


async def test_more_adapters_than_slots_take_turns(tmp_path: Path) -> None:
    backbone = on_device()
    async with open_engine(tmp_path, backbone, max_active_adapters=4) as harness:
        for seed in range(20):
            harness.add(f"n{seed}", make_adapter(backbone, seed=seed))

        async def ask(number: int) -> None:
            entries = harness.entries((f"n{number * 7 % 20}", "free card"))
            (row,) = (await harness.engine.predict(entries)).rows
            scores, _ = alone(harness, entries[0])
            np.testing.assert_allclose(row.scores, scores, rtol=0, atol=BFLOAT16_BOUND)

        await asyncio.gather(*(ask(number) for number in range(200)))
        reports: Sequence[BatchReport] = harness.recorder.batches
        assert max(report.adapters for report in reports) <= 4


@pytest.mark.parametrize("read_bytes", [2**20, 40_000, 0])
async def test_images_that_pass_host_memory_by_answer_as_files_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    # Room for all images that are read at a time, for some of them, for none.
    monkeypatch.setattr(bank, "STAGED_BYTES", read_bytes)
    monkeypatch.setattr(images, "SPARE_BYTES", 0)
    stagings: list[Staging] = []

    class KeptStaging(Staging):
        def __init__(self, nbytes: int, *, pinned: bool) -> None:
            super().__init__(nbytes, pinned=pinned)
            stagings.append(self)

    monkeypatch.setattr(bank, "Staging", KeptStaging)
    backbone, events = on_device(), Events()
    harness = EngineHarness(
        tmp_path,
        backbone,
        max_image_bytes=2**30,
        **(LIMITS | {"max_active_adapters": 4, "max_registered_adapters": 4}),
    )
    harness.engine = LocalEngine(lambda: backbone, harness.store, harness.settings, events)
    await harness.engine.start()
    for seed in range(20):
        harness.add(f"n{seed}", make_adapter(backbone, seed=seed))

    async def ask(name: str) -> np.ndarray:
        (row,) = (await harness.engine.predict(harness.entries((name, "free card")))).rows
        return row.scores

    names = [f"n{number}" for number in range(20)]
    from_files = [await ask(name) for name in names]
    await asyncio.wait_for(events.twenty_made.wait(), 20)
    for name, scores in zip(names, from_files, strict=True):
        np.testing.assert_array_equal(await ask(name), scores)
    assert events.counts["used"] >= 16
    # Many at a time.
    drawn = [names[number * 7 % 20] for number in range(200)]
    answers = await asyncio.gather(*(ask(name) for name in drawn))
    for name, scores in zip(drawn, answers, strict=True):
        expected = from_files[names.index(name)]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=BFLOAT16_BOUND)
    assert events.counts["refused"] == events.counts["failed"] == 0
    await harness.engine.stop()
    gc.collect()
    (staging,) = stagings
    assert staging.nbytes_free == read_bytes


class Events(Observer):
    """Counts what happens to images."""

    def __init__(self) -> None:
        self.counts: Counter[ImageEvent] = Counter()
        self.twenty_made = asyncio.Event()

    def adapter_image(self, event: ImageEvent) -> None:
        self.counts[event] += 1
        if self.counts["made"] == 20:
            self.twenty_made.set()


def _widened(adapter: Adapter, bottleneck: int) -> Adapter:
    """The same function: what is added to the bottleneck is always zero."""
    tensors = dict(adapter.tensors)
    more = bottleneck - attention_of(adapter).bottleneck
    for name, axis in (
        ("generator.down.weight", 1),
        ("generator.down.bias", 0),
        ("generator.up.weight", 0),
    ):
        shape = list(tensors[name].shape)
        shape[axis] = more
        tensors[name] = torch.cat([tensors[name], torch.zeros(shape)], dim=axis)
    spec = adapter.spec.model_copy(
        update={"prompt": attention_of(adapter).model_copy(update={"bottleneck": bottleneck})}
    )
    return Adapter(spec, tensors)
