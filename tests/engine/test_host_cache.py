"""Host memory that is full: an image passes it by, unless its adapter is used more than another."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.adapter import PreparedAdapter, classify, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import parse, serialize
from adapters.format.store import AdapterStore
from adapters.slots.staging import Staging
from service.engine import host_cache
from service.engine import images as images_module
from service.engine.fair_executor import FairExecutor
from service.engine.host_cache import HostCache
from service.engine.images import Images
from service.engine.interface import AdapterKey
from service.engine.observer import ImageEvent
from service.engine.runners.base import HostAdapter, Loaded
from service.engine.runners.packed import PackedRunner
from tests.support.residency_harness import RecordingObserver, ended, let_the_loop_run
from tests.support.tiny_models import make_adapter

pytestmark = pytest.mark.timeout(60)


class StagedRunner(PackedRunner):
    """Lends memory for adapters that pass by, as a runner with a device does."""

    copies = True

    def __init__(self, backbone: Backbone, nbytes: int) -> None:
        super().__init__(backbone)
        self.staging = Staging(nbytes, pinned=False)
        self.nbytes = nbytes

    def memory(self, nbytes: int, *, passing: bool) -> Tensor:
        staged = self.staging.take(nbytes) if passing else None
        return torch.empty(nbytes, dtype=torch.uint8) if staged is None else staged

    @property
    def nbytes_lent(self) -> int:
        return self.nbytes - self.staging.nbytes_free


class Cache:
    """A host cache of two adapters over eight stored ones, which all have images."""

    def __init__(self, cache: HostCache, runner: StagedRunner, images: Images) -> None:
        self.cache, self.runner, self.images = cache, runner, images
        self.recorder = RecordingObserver()
        self.events: list[ImageEvent] = []
        self.keys: dict[str, AdapterKey] = {}

    async def read(self, name: str) -> HostAdapter:
        """Read an adapter that goes to the device at once."""
        read = await self.cache.load(self.keys[name], slot=0)
        await let_the_loop_run()
        return read.adapter

    async def until_nothing_is_lent(self) -> None:
        """A thread that has read an adapter may let go of it a moment later."""
        for _ in range(100):
            if not self.runner.nbytes_lent:
                break
            await asyncio.sleep(0.05)
        assert not self.runner.nbytes_lent

    @property
    def held(self) -> str:
        """The adapters in host memory."""
        return "".join(name for name, key in self.keys.items() if self.cache.peek(key))


@asynccontextmanager
async def open_cache(
    root: Path, backbone: Backbone, *, staged: int = 2**20, max_bytes: int | None = None
) -> AsyncIterator[Cache]:
    store, runner = AdapterStore(root), StagedRunner(backbone, staged)
    events: list[ImageEvent] = []
    images = Images(store, runner, max_bytes=2**26, report=events.append)
    keys = {}
    for seed, name in enumerate("abcdefgh"):
        revision = store.put(name, serialize(make_adapter(backbone, seed=seed))).revision
        keys[name] = key = AdapterKey(name, revision)
        prepared = runner.prepare(parse(store.read(*key)))
        images.keep(key, images.source_of(key), prepared)
    images.settle()
    events.clear()
    recorder = RecordingObserver()
    reading = FairExecutor(2, name="reading")
    cache = HostCache(
        store,
        runner,
        reading=reading,
        observer=recorder,
        capacity=2,
        max_bytes=max_bytes,
        images=images,
    )
    opened = Cache(cache, runner, images)
    opened.recorder, opened.events, opened.keys = recorder, events, keys
    yield opened
    cache.close()
    await ended(reading)


@pytest.fixture(autouse=True)
def on_a_small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "SPARE_BYTES", 0)


async def test_what_comes_once_passes_by_and_what_comes_again_stays(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with open_cache(tmp_path, backbone) as opened:
        for name in "abcde":
            await opened.read(name)
        assert opened.held == ""
        # There is room for two that are used again.
        for name in "ab":
            await opened.read(name)
        assert opened.held == "ab"
        assert not opened.recorder.evicted
        assert set(opened.events) == {"used"}


async def test_an_adapter_takes_the_place_of_one_that_is_used_less(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with open_cache(tmp_path, backbone) as opened:
        for name in "aabb":
            await opened.read(name)
        for _ in range(2):
            await opened.read("c")
            assert opened.held == "ab"
        # It has come twice since `a` was last used.
        await opened.read("c")
        assert opened.held == "bc"
        # `b` and `c` were used since `d` came for the first time.
        await opened.read("d")
        for name in "bc":
            assert opened.cache.get(opened.keys[name]) is not None
        await opened.read("d")
        await opened.read("d")
        assert opened.held == "bc"
        await opened.read("d")
        assert opened.held == "cd"


async def test_many_that_pass_by_are_forgotten_in_turn(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_cache, "_REMEMBERED", 1)
    async with open_cache(tmp_path, backbone) as opened:
        for name in "abc":
            await opened.read(name)
        # As many are remembered as host memory holds: not `a`, and then not `b`.
        await opened.read("a")
        await opened.read("c")
        assert opened.held == "c"
        await opened.read("b")
        assert opened.held == "c"


async def test_bytes_fill_host_memory_as_well(tmp_path: Path, backbone: Backbone) -> None:
    one = PackedRunner(backbone).prepare(make_adapter(backbone, seed=0)).nbytes
    async with open_cache(tmp_path, backbone, max_bytes=one + one // 2) as opened:
        for name in "aabb":
            await opened.read(name)
        assert opened.held == "a"


async def test_memory_that_is_lent_comes_back_and_where_none_is_left_plain_memory_does(
    tmp_path: Path, backbone: Backbone
) -> None:
    one = PackedRunner(backbone).prepare(make_adapter(backbone, seed=0)).nbytes
    async with open_cache(tmp_path, backbone, staged=2 * (one + 8192)) as opened:
        for name in "aabb":
            await opened.read(name)
        # Those that stay have their own.
        assert opened.held == "ab"
        await opened.until_nothing_is_lent()
        passing = [await opened.read(name) for name in "cdefg"]
        assert opened.runner.nbytes_lent >= 2 * one
        for name, adapter in zip("cdefg", passing, strict=True):
            assert_same(backbone, adapter, make_adapter(backbone, seed="abcdefgh".index(name)))
        del passing, adapter
        await opened.until_nothing_is_lent()


async def test_requests_for_one_adapter_that_passes_by_share_its_read(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with open_cache(tmp_path, backbone) as opened:
        for name in "ab":
            await opened.read(name)
        opened.events.clear()
        key = opened.keys["c"]
        reads = await asyncio.gather(*(opened.cache.load(key, slot=0) for _ in range(5)))
        assert len({id(read.adapter) for read in reads}) == 1
        assert opened.events == ["used"]


@pytest.mark.parametrize("change", ["cut", "altered", "gone"])
async def test_an_image_that_is_not_whole_is_not_used_on_its_way_either(
    tmp_path: Path, backbone: Backbone, change: str
) -> None:
    async with open_cache(tmp_path, backbone) as opened:
        for name in "ab":
            await opened.read(name)
        spoil(tmp_path, opened.keys["c"], change)
        opened.events.clear()
        adapter = await opened.read("c")
        assert_same(backbone, adapter, make_adapter(backbone, seed=2))
        # It came from its file, which takes long: it stays, and has an image again.
        assert "c" in opened.held
        opened.images.settle()
        assert opened.events == (["made"] if change == "gone" else ["refused", "made"])
        await opened.until_nothing_is_lent()


async def test_what_was_copied_before_its_checksum_was_found_wrong_is_never_used(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[HostAdapter] = []
    begin_load = PackedRunner.begin_load

    def keeping(self: PackedRunner, slot: int, adapter: HostAdapter) -> Loaded:
        begun.append(adapter)
        return begin_load(self, slot, adapter)

    monkeypatch.setattr(PackedRunner, "begin_load", keeping)
    async with open_cache(tmp_path, backbone) as opened:
        key = opened.keys["c"]
        # From now on its header is known, and its copy begins before its checksum.
        await opened.read("c")
        spoil(tmp_path, key, "altered")
        begun.clear()
        read = await opened.cache.load(key, slot=0)
        altered, sound = begun
        assert read.adapter is sound
        assert read.loaded is sound
        assert altered is not sound
        assert_same(backbone, sound, make_adapter(backbone, seed=2))
        opened.images.settle()
        assert opened.events[-2:] == ["refused", "made"]


async def test_a_device_that_cannot_load_does_not_cost_an_image(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Loaded:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async with open_cache(tmp_path, backbone) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(PackedRunner, "begin_load", full)
            with pytest.raises(torch.OutOfMemoryError):
                await opened.read("c")
        assert opened.events == ["used"]
        await opened.read("c")
        assert opened.events == ["used", "used"]


def spoil(root: Path, key: AdapterKey, change: str) -> None:
    (path,) = root.glob(f".images/*/{key.revision}*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    match change:
        case "cut":
            path.write_bytes(content[:-7])
        case "altered":
            path.write_bytes(content)
        case _:
            path.unlink()


def assert_same(backbone: Backbone, adapter: HostAdapter, expected: object) -> None:
    """An adapter answers as the one of this file, to the bit."""
    prepared = PackedRunner(backbone).prepare(expected)  # type: ignore[arg-type]
    rows = [(0, backbone.encoder.encode(text, max_length=64)) for text in ("", "free card now")]
    answers = []
    for one in (adapter, prepared):
        assert isinstance(one, PreparedAdapter)
        batch = backbone.pack(rows_of([one], rows))
        answers.append([answer.scores for answer in classify(backbone, batch, [one])])
    for a, b in zip(*answers, strict=True):
        np.testing.assert_array_equal(a, b)
