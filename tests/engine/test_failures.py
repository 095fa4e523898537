"""What fails fails alone, by name and at once: files, memory, numbers, deadlines, the thread."""

import asyncio
import ctypes
import logging
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from time import monotonic

import pytest
import torch

from service.engine.interface import AdapterKey
from service.errors import (
    AdapterLoadFailed,
    DeadlineExceeded,
    EngineUnavailable,
    InferenceFailed,
    Overloaded,
    TooLarge,
)
from tests.support.engine_harness import Opened, run, unbounded


def test_an_unknown_revision_and_a_rotten_file_fail_by_name_and_others_go_on(
    opened: Opened,
) -> None:
    async def test() -> None:
        async with opened() as house:
            house.store.path("b", house.keys["b"].revision).write_bytes(b"rotten")
            with pytest.raises(AdapterLoadFailed, match="'b'"):
                await house.engine.predict(house.entries(("a", "x"), ("b", "x")))
            house.keys["c"] = AdapterKey("c", "0" * 64)
            with pytest.raises(AdapterLoadFailed, match="'c'"):
                await house.engine.predict(house.entries(("c", "x")))
            entries = house.entries(("a", "x"))
            house.agrees(entries, await house.engine.predict(entries))
            assert house.recorder.failures == [("adapter_load", 2), ("adapter_load", 1)]
            assert house.engine.health().details["waiting_tokens"] == 0

    run(test())


def test_over_the_limit_is_refused_as_a_whole_and_says_when_to_come_back(
    opened: Opened,
) -> None:
    async def test() -> None:
        async with opened(max_waiting_tokens=60) as house:
            held = await house.held()
            first = asyncio.create_task(
                house.engine.predict(house.entries(*(("a", "hello you"),) * 10))
            )
            await house.waiting_entries(10)
            before = house.engine.health().details["waiting_tokens"]
            with pytest.raises(Overloaded) as refused:
                await house.engine.predict(house.entries(*(("a", "hello you"),) * 3))
            assert 0.0 < refused.value.retry_after < 10.0
            assert house.engine.health().details["waiting_tokens"] == before
            with pytest.raises(TooLarge):
                await house.engine.predict(house.entries(("a", "win " * 100)))
            house.device.free()
            await asyncio.gather(held, first)
            assert house.recorder.failures == [("overloaded", 3)]

    run(test())


def test_a_request_past_its_deadline_fails_at_once_and_is_never_run(opened: Opened) -> None:
    async def test() -> None:
        async with opened() as house:
            held = await house.held()
            started = monotonic()
            with pytest.raises(DeadlineExceeded):
                await house.engine.predict(
                    house.entries(("b", "late"), ("a", "late")), deadline=started + 0.05
                )
            # The device is still busy: the caller did not have to wait for it.
            assert 0.05 <= monotonic() - started < 5.0
            assert house.engine.health().details["waiting_entries"] == 0
            with pytest.raises(DeadlineExceeded):
                await house.engine.predict(house.entries(("a", "x")), deadline=monotonic() - 1.0)
            house.device.free()
            await held
            assert house.device.rows == [1]
            assert house.recorder.failures == [("deadline", 2), ("deadline", 1)]

    run(test())


def test_a_deadline_also_ends_the_wait_for_adapters(opened: Opened) -> None:
    async def test() -> None:
        async with opened(max_active_adapters=1) as house:
            held = await house.held()
            with pytest.raises(DeadlineExceeded):
                await house.engine.predict(house.entries(("b", "x")), deadline=monotonic() + 0.05)
            house.device.free()
            await held
            entries = house.entries(("b", "x"))
            house.agrees(entries, await house.engine.predict(entries))

    run(test())


def test_a_batch_that_fails_answers_exactly_its_rows_and_the_engine_lives(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with opened() as house:
            house.device.error = lambda: ValueError("secret path")
            with pytest.raises(InferenceFailed, match="ValueError") as failed:
                await house.engine.predict(house.entries(("a", "x"), ("b", "y")))
            assert failed.value.reason == "batch_error"
            # What went wrong inside is for the log, not for the caller.
            assert "secret" not in str(failed.value)
            assert "secret" in caplog.text
            house.device.error = None
            entries = house.entries(("a", "x"), ("b", "y"))
            house.agrees(entries, await house.engine.predict(entries))
            assert house.engine.health().ready

    run(test())


def test_a_batch_too_large_for_the_memory_is_split_until_it_fits(opened: Opened) -> None:
    async def test() -> None:
        async with opened(max_batch_tokens=1024) as house:
            house.device.most_rows = 3
            entries = house.entries(*(("abc"[i % 3], "win " * i) for i in range(11)))
            house.agrees(entries, await house.engine.predict(entries))
            assert house.device.rows == [11, 5, 2, 3, 6, 3, 3]
            assert [report.rows for report in house.recorder.batches] == [11]

    run(test())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
def test_a_single_row_without_memory_fails_alone(opened: Opened, error: Exception) -> None:
    async def test() -> None:
        async with opened() as house:
            house.device.error = lambda: error
            with pytest.raises(InferenceFailed, match="memory") as failed:
                await house.engine.predict(house.entries(("a", "x")))
            assert failed.value.reason == "out_of_memory"
            assert house.engine.health().ready

    run(test())


def test_a_real_lack_of_memory_splits_the_batch() -> None:
    """In a process whose address space is limited: the allocator itself refuses."""
    code = """
        import resource, torch
        from adapters.adapter import prepare
        from service.engine.runners.packed import PackedRunner
        from service.engine.runners.base import Asked, RowFailure
        from tests.support.tiny_models import make_adapter, make_backbone
        torch.set_num_threads(1)
        backbone = make_backbone(max_tokens=512)
        runner = PackedRunner(backbone)
        adapter = prepare(make_adapter(backbone), backbone)
        text = backbone.encoder.encode("win " * 600, max_length=512)
        runner.launch([Asked(text, adapter)] * 2)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        # The generator's scores of one row are 512 * 512 floats, a megabyte, twice over.
        resource.setrlimit(resource.RLIMIT_AS, (used + 48 * 2**20, -1))
        ran = runner.launch([Asked(text, adapter)] * 32)
        assert ran.passes > 1, ran.passes
        assert not any(isinstance(item, RowFailure) for item in ran.outcomes), ran.outcomes
        assert len(ran.outcomes) == 32
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_row_whose_scores_are_not_finite_fails_alone(opened: Opened) -> None:
    async def test() -> None:
        async with opened() as house:
            house.add("bad", unbounded(house.backbone))
            held = await house.held()
            entries = house.entries(("b", "hello"), ("c", "you"))
            good = asyncio.create_task(house.engine.predict(entries))
            bad = asyncio.create_task(house.engine.predict(house.entries(("bad", "hello"))))
            await house.waiting_entries(3)
            house.device.free()
            house.agrees(entries, await good)
            with pytest.raises(InferenceFailed, match="finite"):
                await bad
            await held
            # In one batch, or the good rows would prove nothing.
            assert house.device.rows == [1, 3]
            assert house.recorder.failures == [("not_finite", 1)]

    run(test())


def engine_thread() -> int:
    (thread,) = [item for item in threading.enumerate() if item.name == "engine"]
    assert thread.ident is not None
    return thread.ident


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_thread_fails_every_waiter_and_turns_live_off(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with opened(max_active_adapters=1) as house:
            held = await house.held()
            queued = asyncio.create_task(house.engine.predict(house.entries(("a", "x"))))
            for_a_slot = asyncio.create_task(house.engine.predict(house.entries(("b", "x"))))
            await house.waiting_entries(1)
            killed = ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(engine_thread()), ctypes.py_object(SystemExit)
            )
            assert killed == 1
            house.device.free()
            answers = await asyncio.gather(held, queued, for_a_slot, return_exceptions=True)
            assert [type(item) for item in answers] == [EngineUnavailable] * 3
            health = house.engine.health()
            assert not health.live
            assert not health.ready
            assert "died" in str(health.reason)
            with pytest.raises(EngineUnavailable, match="died"):
                await house.engine.predict(house.entries(("a", "x")))
            await asyncio.wait_for(house.engine.drain(), 1)

    with caplog.at_level(logging.CRITICAL, logger="service.engine.device"):
        run(test())


def test_a_batch_that_hangs_turns_live_off_until_it_ends(opened: Opened) -> None:
    async def test() -> None:
        async with opened(stall_seconds=0.05) as house:
            held = await house.held()
            await asyncio.sleep(0.1)
            health = house.engine.health()
            assert not health.live
            assert not health.ready
            assert "running" in str(health.reason)
            house.device.free()
            await held
            assert house.engine.health().ready

    run(test())
