"""The engine's event loop and its lane stay on one core, and nothing else does."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from service import local
from service.engine import affinity
from service.engine.affinity import SharedCore, shared_core
from service.engine.engine import LocalEngine
from service.engine.runners.base import HostAdapter
from service.engine.runners.packed import PackedRunner
from service.local import engine_settings
from service.settings import read_settings
from tests.support.engine_harness import EngineHarness
from tests.support.tiny_models import make_adapter

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores whose threads can be moved",
)
CORES = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


@pytest.fixture(autouse=True)
def free_afterwards() -> Iterator[None]:
    yield
    os.sched_setaffinity(0, CORES)


def in_a_thread(run: Callable[[], None]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_both_threads_go_to_the_core_that_the_second_one_is_on() -> None:
    main, core = threading.get_native_id(), min(CORES)
    shared = SharedCore(CORES, lambda: core)
    seen = []

    def lane() -> None:
        # Kept, looked at again too early, set free, and kept again.
        for now in (10.0, 11.9, 12.1, 12.2):
            shared.keep(now, spun=False)
            seen.append((os.sched_getaffinity(0), os.sched_getaffinity(main)))
        shared.leave()
        seen.append((os.sched_getaffinity(0), os.sched_getaffinity(main)))

    in_a_thread(lane)
    one = {core}
    assert seen == [(one, one), (one, one), (CORES, one), (one, one), (CORES, one)]
    shared.leave()
    assert os.sched_getaffinity(0) == CORES


def test_while_batches_are_small_both_threads_are_free() -> None:
    main, core = threading.get_native_id(), min(CORES)
    shared = SharedCore(CORES, lambda: core)
    seen = []

    def lane() -> None:
        # Small ones from the first. Then most are large: seen after a quarter of a second.
        for now, spun in ((10.0, True), (10.1, False), (10.2, False), (10.26, False)):
            shared.keep(now, spun=spun)
            seen.append((os.sched_getaffinity(0), os.sched_getaffinity(main)))
        # Most are small again: seen when the two seconds are over.
        for now, spun in ((11.0, True), (12.0, False), (12.27, True), (12.4, False)):
            shared.keep(now, spun=spun)
            seen.append((os.sched_getaffinity(0), os.sched_getaffinity(main)))

    in_a_thread(lane)
    free, kept = (CORES, CORES), ({core}, {core})
    assert seen == [free, free, free, kept, kept, kept, free, free]


def test_small_batches_in_the_moment_of_free_choice_set_the_event_loop_free() -> None:
    main, core = threading.get_native_id(), min(CORES)
    shared = SharedCore(CORES, lambda: core)
    seen = []

    def lane() -> None:
        for now, spun in ((10.0, False), (12.1, False), (12.13, True)):
            shared.keep(now, spun=spun)
            seen.append((os.sched_getaffinity(0), os.sched_getaffinity(main)))

    in_a_thread(lane)
    assert seen == [({core}, {core}), (CORES, {core}), (CORES, CORES)]


def test_the_event_loop_goes_to_the_engine_that_works() -> None:
    main, (first, second) = threading.get_native_id(), sorted(CORES)[:2]
    engines = [SharedCore(CORES, lambda: first), SharedCore(CORES, lambda: second)]
    seen = []

    def lanes() -> None:
        for engine in (0, 1, 0):
            engines[engine].keep(10.0, spun=False)
            seen.append(os.sched_getaffinity(main))

    in_a_thread(lanes)
    assert seen == [{first}, {second}, {first}]


def test_where_it_is_forbidden_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "not here")

    shared = SharedCore(CORES, lambda: 0)
    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    with caplog.at_level(logging.WARNING):
        for now in (10.0, 20.0, 30.0):
            shared.keep(now, spun=False)
    (record,) = caplog.records
    assert "the engine's threads stay where they are: " in record.message
    shared.leave()
    monkeypatch.undo()


def test_few_cores_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, taken in ((1, False), (3, False), (4, True)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=count: set(range(count)))
        assert (shared_core() is not None) == taken
    monkeypatch.undo()


def test_only_an_engine_on_a_gpu_in_a_process_of_its_own_does_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = read_settings({"IDSPAM_DEVICE": "cpu"})
    assert not engine_settings(settings, alone=True).one_core
    # `resolve_device` would look for the GPU.
    monkeypatch.setattr(local, "resolve_device", lambda _: torch.device("cuda"))
    assert engine_settings(settings, alone=True).one_core
    assert not engine_settings(settings).one_core
    off = read_settings({"IDSPAM_DEVICE": "cpu", "IDSPAM_ONE_CORE": "no"})
    assert not engine_settings(off, alone=True).one_core


async def test_an_engine_on_one_core_reads_adapters_on_all(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "_FEWEST_CORES", 1)
    harness = EngineHarness(tmp_path, backbone)
    for seed in range(3):
        harness.add(f"a{seed}", make_adapter(backbone, seed=seed))
    runner = PackedRunner(backbone, lanes=1)
    loading: list[set[int]] = []

    def prepare(adapter: Adapter) -> HostAdapter:
        loading.append(os.sched_getaffinity(0))
        return PackedRunner.prepare(runner, adapter)

    monkeypatch.setattr(runner, "prepare", prepare)
    monkeypatch.setattr("service.engine.engine._make_runner", lambda *_: runner)
    settings = replace(
        engine_settings(read_settings({"IDSPAM_DEVICE": "cpu", "IDSPAM_CPU_LANES": "1"})),
        one_core=True,
    )
    engine = LocalEngine(lambda: backbone, harness.store, settings)
    await engine.start()
    for number in range(3):
        await engine.predict(harness.entries((f"a{number}", "free card")))
        await asyncio.sleep(0.01)
        assert len(os.sched_getaffinity(0)) == 1
        assert await asyncio.to_thread(os.sched_getaffinity, 0) == CORES
    assert loading
    assert all(cores == CORES for cores in loading)
    await engine.stop()
    assert os.sched_getaffinity(0) == CORES
