"""Images on disk: the same answers to the bit as from files, and none that is not whole is used."""

import asyncio
import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters import faults
from adapters.adapter import PreparedAdapter, classify, rows_of
from adapters.backbone.model import Backbone
from adapters.errors import DamagedFile
from adapters.format.files import parse, serialize
from adapters.format.store import AdapterStore
from adapters.shared.cache import CachedStore
from adapters.shared.objects import ObjectStore, store_object
from service.engine import images as module
from service.engine.engine import LocalEngine
from service.engine.images import FOLDER, Images, fingerprint_of
from service.engine.interface import AdapterKey
from service.engine.observer import ImageEvent, Observer
from service.engine.runners.base import HostAdapter
from service.engine.runners.packed import PackedRunner
from service.engine.settings import EngineSettings
from tests.support.engine_harness import EngineHarness
from tests.support.kinds import adapters_of_all_kinds
from tests.support.log_entries import record
from tests.support.tiny_models import make_adapter, make_backbone

# A test that hangs fails.
pytestmark = pytest.mark.timeout(60)

TEXTS = ("", "free card now", "hello good you " * 9)
MIB = 2**20


class Place:
    """A store with an adapter of every kind, and its images."""

    def __init__(self, root: Path, backbone: Backbone, *, max_bytes: int = 64 * MIB) -> None:
        self.backbone = backbone
        self.runner = PackedRunner(backbone)
        self.store = AdapterStore(root)
        self.keys: dict[str, AdapterKey] = {}
        for number, (kind, adapter) in enumerate(adapters_of_all_kinds(backbone).items()):
            name = f"n{number}"
            revision = self.store.put(name, serialize(adapter)).revision
            self.keys[kind] = AdapterKey(name, revision)
        self.events: Counter[ImageEvent] = Counter()
        self.images = self.open(max_bytes=max_bytes)

    def open(self, *, max_bytes: int = 64 * MIB, backbone: Backbone | None = None) -> Images:
        """The images as another process sees them."""
        return Images(
            self.store,
            PackedRunner(backbone) if backbone else self.runner,
            max_bytes=max_bytes,
            report=lambda event: self.events.update([event]),
        )

    def from_file(self, key: AdapterKey) -> HostAdapter:
        return self.runner.prepare(parse(self.store.read(*key)))

    def make(self, key: AdapterKey, images: Images | None = None) -> Path:
        """Have an image made; returns its path."""
        images = images or self.images
        images.keep(key, images.source_of(key), self.from_file(key))
        images.settle()
        return self.path(key)

    def path(self, key: AdapterKey) -> Path:
        folder = self.store.root / FOLDER / fingerprint_of(self.runner)
        return folder / f"{key.revision}-{self.store.signature(*key)}.image"

    def load(self, key: AdapterKey, images: Images | None = None) -> HostAdapter | None:
        images = images or self.images
        return images.load(key, images.source_of(key))

    def answers(self, adapter: HostAdapter | None) -> list[np.ndarray]:
        assert isinstance(adapter, PreparedAdapter)
        rows = [(0, self.backbone.encoder.encode(text, max_length=64)) for text in TEXTS]
        batch = self.backbone.pack(rows_of([adapter], rows))
        return [answer.scores for answer in classify(self.backbone, batch, [adapter])]

    def assert_same(self, one: HostAdapter | None, other: HostAdapter | None) -> None:
        for a, b in zip(self.answers(one), self.answers(other), strict=True):
            assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Place:
    return Place(tmp_path_factory.mktemp("store"), backbone)


@pytest.fixture
def place(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Place:
    # The disk of a test may be small.
    monkeypatch.setattr(module, "SPARE_BYTES", 0)
    return Place(tmp_path, backbone)


@pytest.fixture
def fail() -> Iterator[Callable[[str, int], None]]:
    """Makes a fault point fail with an error number; 0: no more."""

    def install(point: str, number: int) -> None:
        def handler(name: str) -> bool:
            if name == point:
                raise OSError(number, os.strerror(number))
            return False

        faults.install(handler if number else None)

    yield install
    faults.install(None)


@pytest.mark.slow
def test_every_kind_of_adapter_answers_from_its_image_as_from_its_file(place: Place) -> None:
    for kind, key in place.keys.items():
        assert place.load(key) is None, kind
        place.make(key)
        for images in (place.images, place.open()):
            place.assert_same(place.load(key, images), place.from_file(key))
    assert place.events == {"made": len(place.keys), "used": 2 * len(place.keys)}


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_altered_bytes_are_never_served(shared_place: Place, data: st.DataObject) -> None:
    place = shared_place
    key = place.keys[data.draw(st.sampled_from(sorted(place.keys)))]
    path = place.make(key)
    good = path.read_bytes()
    bad = bytearray(good)
    match data.draw(st.sampled_from(["flip", "cut", "grow", "zeros"])):
        case "flip":
            for _ in range(data.draw(st.integers(1, 3))):
                at = data.draw(st.integers(0, len(bad) - 1))
                bad[at] ^= data.draw(st.integers(1, 255))
        case "cut":
            del bad[data.draw(st.integers(0, len(bad) - 1)) :]
        case "grow":
            bad += bytes(data.draw(st.integers(1, 999)))
        case "zeros":
            bad = bytearray(len(bad))
    # Drawn before the file is altered: a draw may end the example.
    reopened = data.draw(st.booleans())
    if bytes(bad) == good:
        return
    # As the disk would do it: in place, under the name of the good image.
    path.write_bytes(bad)
    refused = place.events["refused"]
    loaded = place.load(key, place.open() if reopened else place.images)
    # What was appended to a whole image is not read by who knows its size.
    if loaded is None:
        assert place.events["refused"] == refused + 1
        assert not path.exists()
        loaded = place.from_file(key)
    place.assert_same(loaded, place.from_file(key))
    # It is made anew, the same to the bit.
    path.unlink(missing_ok=True)
    place.images = place.open()
    assert place.make(key).read_bytes() == good


def test_an_image_of_another_adapter_or_fingerprint_is_not_used(place: Place) -> None:
    one, other = place.make(place.keys["idspam"]), place.make(place.keys["lora"])
    shutil.copyfile(other, one)
    assert place.load(place.keys["idspam"], place.open()) is None
    assert place.events["refused"] == 1
    changed = make_backbone(seed=1)
    foreign = place.open(backbone=changed)
    assert foreign.load(place.keys["lora"], foreign.source_of(place.keys["lora"])) is None
    folder = place.store.root / FOLDER / fingerprint_of(PackedRunner(changed))
    folder.mkdir()
    shutil.copyfile(other, folder / other.name)
    foreign = place.open(backbone=changed)
    assert foreign.load(place.keys["lora"], foreign.source_of(place.keys["lora"])) is None
    assert place.events["refused"] == 2


def test_the_fingerprint_tells_code_type_backbone_and_form_apart(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = PackedRunner(backbone)
    before = fingerprint_of(runner)
    assert fingerprint_of(PackedRunner(backbone)) == before
    seen = {before, fingerprint_of(PackedRunner(make_backbone(seed=1)))}
    seen.add(fingerprint_of(PackedRunner(make_backbone().to(dtype=torch.bfloat16))))
    monkeypatch.setattr(PackedRunner, "form", "another")
    seen.add(fingerprint_of(runner))
    monkeypatch.setattr(module, "_code", lambda: "changed")
    seen.add(fingerprint_of(runner))
    assert len(seen) == 5


def test_a_file_that_changed_has_no_image(place: Place) -> None:
    key = place.keys["idspam"]
    place.make(key)
    file = place.store.path(*key)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x00")
    assert place.load(key) is None
    with pytest.raises(DamagedFile):
        place.from_file(key)
    file.write_bytes(content)
    assert place.load(key) is None
    place.make(key)
    place.assert_same(place.load(key), place.from_file(key))
    file.unlink()
    assert place.images.source_of(key) is None
    assert place.images.load(key, None) is None


def test_a_file_that_changes_while_it_is_read_gets_no_image(place: Place) -> None:
    key = place.keys["idspam"]
    source, adapter = place.images.source_of(key), place.from_file(key)
    os.utime(place.store.path(*key), ns=(1, 1))
    place.images.keep(key, source, adapter)
    place.images.settle()
    assert not place.images.has(key)
    assert not place.events["made"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_images_is_said_once_and_files_serve(
    place: Place,
    fail: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    caplog.set_level("INFO")
    fail("image.write", number)
    first, second = place.keys["idspam"], place.keys["lora"]
    for key in (first, second, first):
        path = place.make(key)
        assert place.load(key) is None
        assert not path.exists()
    assert [os.strerror(number) in line for line in caplog.messages] == [True]
    assert place.events == {"failed": 3}
    assert not list(path.parent.glob("*.tmp"))
    fail("", 0)
    place.make(first)
    assert caplog.messages[1:] == ["images of adapters are written again"]
    place.assert_same(place.load(first), place.from_file(first))


def test_little_space_is_left_to_adapter_files(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SPARE_BYTES", 2**60)
    place.make(place.keys["idspam"])
    assert place.load(place.keys["idspam"]) is None
    assert "MiB are free" in caplog.text
    # Nothing is tried for a while.
    place.make(place.keys["lora"])
    assert place.events == {"failed": 1}


def test_the_folder_may_be_anything_or_vanish(place: Place) -> None:
    key = place.keys["idspam"]
    path = place.make(key)
    shutil.rmtree(path.parent.parent)
    assert place.load(key) is None
    place.make(key)
    assert path.exists()
    shutil.rmtree(path.parent.parent)
    path.parent.parent.write_text("no folder")
    images = place.open()
    images.keep(key, images.source_of(key), place.from_file(key))
    images.settle()
    images.sweep()
    assert place.load(key, images) is None
    assert place.events["failed"] == 1


def test_what_an_interrupted_writer_left_and_cannot_be_removed_is_in_nobodys_way(
    place: Place,
) -> None:
    key = place.keys["idspam"]
    path = place.make(key)
    # A folder cannot be unlinked, whoever tries.
    stuck = path.with_name("0.tmp")
    stuck.mkdir()
    os.utime(stuck, (0, 0))
    images = place.open()
    place.assert_same(place.load(key, images), place.from_file(key))
    images.sweep()
    assert path.exists()


def test_images_beyond_the_limit_go_the_least_recently_used_first(place: Place) -> None:
    kinds = ["idspam", "lora", "vectors"]
    sizes = [place.make(place.keys[kind]).stat().st_size for kind in kinds]
    place.load(place.keys["idspam"])
    small = place.open(max_bytes=sum(sizes))
    for kind in ("lora", "idspam", "vectors"):
        assert small.load(place.keys[kind], small.source_of(place.keys[kind])) is not None
    assert not small.nbytes > sum(sizes)
    assert small.is_full
    place.make(place.keys["head"], small)
    assert not place.path(place.keys["lora"]).exists()
    assert place.path(place.keys["vectors"]).exists()
    assert small.nbytes <= sum(sizes)
    # One that alone is too large is not written.
    tiny = place.open(max_bytes=100)
    place.make(place.keys["smop"], tiny)
    assert not place.path(place.keys["smop"]).exists()


def test_images_of_revisions_that_are_gone_are_removed(place: Place) -> None:
    kept, discarded, deleted = (place.keys[kind] for kind in ("idspam", "lora", "vectors"))
    paths = [place.make(key) for key in (kept, discarded, deleted)]
    place.images.discard(discarded)
    place.images.settle()
    assert [path.exists() for path in paths] == [True, False, True]
    place.store.delete(deleted.name)
    old = paths[0].parent.with_name("0" * 32)
    old.mkdir()
    (old / "x.image").write_bytes(b"of an older version")
    abandoned = paths[0].parent / "y.tmp"
    abandoned.write_bytes(b"of a writer that was killed")
    os.utime(abandoned, (0, 0))
    place.open().sweep()
    assert [path.exists() for path in paths] == [True, False, False]
    assert not old.exists()
    assert {path.name for path in paths[0].parent.iterdir()} == {paths[0].name}


def test_the_image_of_a_file_with_two_names_stays_until_both_are_gone(place: Place) -> None:
    one = place.keys["idspam"]
    data = place.store.read(*one)
    other = AdapterKey("twin", place.store.put("twin", data).revision)
    assert other.revision == one.revision
    paths = [place.make(key) for key in (one, other)]
    place.images.discard(other)
    place.images.settle()
    assert [path.exists() for path in paths] == [True, paths[0] == paths[1]]
    assert place.load(one) is not None
    place.images.discard(one)
    place.images.settle()
    assert not any(path.exists() for path in paths)


@pytest.mark.slow
def test_two_processes_on_one_folder_do_not_disturb_each_other(place: Place) -> None:
    both = [place.open(), place.open()]
    keys = list(place.keys.values())
    expected = {key: place.answers(place.from_file(key)) for key in keys}

    def work(number: int) -> None:
        images, rng = both[number % 2], np.random.default_rng(number)
        for _ in range(30):
            key = keys[rng.integers(len(keys))]
            source = images.source_of(key)
            adapter = images.load(key, source)
            if adapter is None:
                adapter = place.from_file(key)
                images.keep(key, source, adapter)
            for one, other in zip(place.answers(adapter), expected[key], strict=True):
                assert np.array_equal(one, other)
            if rng.random() < 0.2:
                images.discard(key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    for images in both:
        images.settle()
    assert not place.events["refused"]
    assert not place.events["failed"]


def test_the_engine_of_a_further_device_reads_what_the_first_one_writes(place: Place) -> None:
    """It neither writes nor removes, so that their bytes are counted once."""
    reader = Images(place.store, place.runner, max_bytes=64 * MIB, writes=False)
    key = next(iter(place.keys.values()))
    source = place.images.source_of(key)
    assert reader.load(key, source) is None
    reader.keep(key, source, place.from_file(key))
    reader.settle()
    assert reader.load(key, source) is None
    place.images.keep(key, source, place.from_file(key))
    place.images.settle()
    assert reader.load(key, source) is not None
    reader.discard(key)
    reader.settle()
    assert place.images.load(key, source) is not None
    image = place.path(key)
    image.write_bytes(image.read_bytes()[:-1])
    assert reader.load(key, source) is None
    assert image.exists(), "the first engine removes it, and makes it anew"
    reader.close()


def test_a_replica_loads_from_an_image_what_its_cache_has_evicted(
    tmp_path: Path, backbone: Backbone
) -> None:
    objects = ObjectStore(str(tmp_path / "shared"))
    content = serialize(make_adapter(backbone))
    place = Place.__new__(Place)
    place.backbone, place.runner, place.events = backbone, PackedRunner(backbone), Counter()
    store = CachedStore(tmp_path / "cache", objects, max_bytes=1)
    store.follow({"a": record(content)})
    key = AdapterKey("a", store.current("a"))
    store_object(objects, key.revision, content)
    place.store = store
    images = place.open()
    source, adapter = images.source_of(key), place.from_file(key)
    images.keep(key, source, adapter)
    images.settle()
    assert not store.path(*key).exists()
    objects.delete(f"objects/{key.revision}.safetensors")
    place.assert_same(images.load(key, source), adapter)
    images.sweep()
    assert images.nbytes
    # What the log does not list has no image.
    store.apply("a", None)
    images.sweep()
    assert not images.nbytes


async def test_an_engine_answers_from_images_after_a_restart_and_makes_them_for_uploads(
    tmp_path: Path, backbone: Backbone
) -> None:
    harness = EngineHarness(tmp_path, backbone)
    recorder = ImageRecorder()
    limits = EngineSettings(max_batch_tokens=256, max_active_adapters=2, max_image_bytes=64 * MIB)
    entries = harness.entries(("a", "free card"), ("b", "hello you"), ("a", "now"))
    answers = []
    for start in range(2):
        engine = LocalEngine(lambda: backbone, harness.store, limits, recorder)
        await engine.start()
        answers.append(await engine.predict(entries))
        # There is no room for the third: its image is made when there is time.
        await engine.preload(harness.keys["c"])
        async with asyncio.timeout(20):
            await recorder.made_three.wait()
        assert recorder.events == {"made": 3} | ({"used": 2} if start else {})
        await engine.stop()
    for one, other in zip(answers[0].rows, answers[1].rows, strict=True):
        assert np.array_equal(one.scores, other.scores)
    images = list((tmp_path / FOLDER).glob("*/*.image"))
    assert {path.name[:64] for path in images} == {key.revision for key in harness.keys.values()}


class ImageRecorder(Observer):
    """Counts what happens to images."""

    def __init__(self) -> None:
        self.events: Counter[ImageEvent] = Counter()
        self.made_three = asyncio.Event()

    def adapter_image(self, event: ImageEvent) -> None:
        self.events[event] += 1
        if self.events["made"] == 3:
            self.made_three.set()
