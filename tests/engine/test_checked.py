"""What an upload's check made of a file is used when it is published; it is not read again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event

import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, serialize, validate_file
from service.engine import engine
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, CheckedAdapter
from service.engine.runners.packed import PackedRunner
from tests.support.engine_harness import EngineHarness
from tests.support.tiny_models import make_adapter

NEW = 7


class CopyingRunner(PackedRunner):
    """Its adapters are in memory of their own, as on a device."""

    copies = True


@asynccontextmanager
async def engine_with(
    runner: PackedRunner, root: Path, monkeypatch: pytest.MonkeyPatch, **limits: int
) -> AsyncIterator[EngineHarness]:
    """An engine that writes images."""
    harness = EngineHarness(root, runner.backbone, max_image_bytes=2**30, **limits)
    harness.engine = LocalEngine(
        lambda: runner.backbone, harness.store, harness.settings, harness.recorder
    )
    with monkeypatch.context() as patch:
        patch.setattr("service.engine.engine._make_runner", lambda *_: runner)
        await harness.engine.start()
        yield harness
        await harness.engine.stop()


async def checked_and_stored(harness: EngineHarness, root: Path) -> CheckedAdapter:
    """Adapter `new`, as the catalog publishes it."""
    adapter = make_adapter(harness.backbone, seed=NEW)
    file = root / "upload"
    file.write_bytes(serialize(adapter))
    checked = await harness.engine.check(file)
    assert checked.spec == adapter.spec
    harness.add("new", adapter)
    return checked


def refuse_to_read(harness: EngineHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(name: str, _: str) -> bytes:
        pytest.fail(f"{name} is read again")

    monkeypatch.setattr(harness.store, "read", read)


async def images_of(harness: EngineHarness, key: AdapterKey) -> list[Path]:
    """Once there are some: two threads take part in writing one."""
    for _ in range(1000):
        if found := list(harness.store.root.glob(f".images/*/{key.revision}-*.image")):
            return found
        await asyncio.sleep(0.01)
    return []


async def test_a_published_adapter_is_not_read_again(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CopyingRunner(backbone, lanes=1)
    async with engine_with(runner, tmp_path / "store", monkeypatch) as harness:
        checked = await checked_and_stored(harness, tmp_path)
        refuse_to_read(harness, monkeypatch)
        await harness.engine.preload(harness.keys["new"], checked)
        entries = harness.entries(("new", "free card"), ("new", ""))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))
        assert len(await images_of(harness, harness.keys["new"])) == 1


async def test_without_room_on_the_device_only_its_image_is_written(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CopyingRunner(backbone, lanes=1)
    store = tmp_path / "store"
    async with engine_with(runner, store, monkeypatch, max_active_adapters=2) as harness:
        for name in "ab":
            await harness.engine.preload(harness.keys[name])
        checked = await checked_and_stored(harness, tmp_path)
        refuse_to_read(harness, monkeypatch)
        key = harness.keys["new"]
        await harness.engine.preload(key, checked)
        assert harness.engine._loaded().host_cache.peek(key) is None
        assert len(await images_of(harness, key)) == 1
        # Its first load is from that image.
        entries = harness.entries(("new", "free card"))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))


async def test_where_tensors_are_the_mapped_file_it_is_read_again(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever writes to the file would change answers, or end the process."""
    runner = PackedRunner(backbone, lanes=1)
    async with engine_with(runner, tmp_path / "store", monkeypatch) as harness:
        checked = await checked_and_stored(harness, tmp_path)
        assert checked.prepared is None
        (tmp_path / "upload").write_bytes(b"something else")
        await harness.engine.preload(harness.keys["new"], checked)
        entries = harness.entries(("new", "free card"))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))


async def test_an_upload_waits_for_no_more_reads_than_have_begun(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_with(PackedRunner(backbone), tmp_path, monkeypatch) as harness:
        names = [f"cold{number}" for number in range(40)]
        for number, name in enumerate(names):
            harness.add(name, make_adapter(backbone, seed=number))
        file, gate = tmp_path / "upload", Event()
        file.write_bytes(serialize(make_adapter(backbone, seed=NEW)))
        begun: list[str] = []
        reading, read = Event(), harness.store.read

        def held_read(name: str, revision: str) -> bytes:
            begun.append(name)
            reading.set()
            assert gate.wait(10)
            return read(name, revision)

        def noted_validate(path: Path) -> Adapter:
            begun.append("upload")
            return validate_file(path)

        monkeypatch.setattr(harness.store, "read", held_read)
        monkeypatch.setattr(engine, "validate_file", noted_validate)
        asked = [
            asyncio.create_task(
                harness.engine.predict(harness.entries((name, "x")), client="noisy")
            )
            for name in names
        ]
        assert await asyncio.to_thread(reading.wait, 10)
        checking = asyncio.create_task(harness.engine.check(file))
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(checking, *asked)
        threads = len(harness.engine._reading._threads)
        # What runs, and what has begun to run beside it.
        assert begun.index("upload") <= 2 * threads
        assert len(begun) == 41
