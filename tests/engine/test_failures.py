"""Failures of files, memory, numbers, deadlines and threads hit only the requests concerned."""

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

from adapters.faults import install
from adapters.packed.packing import PackedBatch
from service.engine.interface import AdapterKey
from service.engine.runners.base import DeviceAdapter
from service.errors import (
    AdapterLoadFailed,
    DeadlineExceeded,
    EngineUnavailable,
    InferenceFailed,
    Overloaded,
    TooLarge,
)
from tests.support.engine_harness import OpenEngine, adapter_with_infinite_scores

# A test that hangs fails.
pytestmark = pytest.mark.timeout(30)


async def test_an_unknown_revision_or_damaged_file_fails_by_name_and_others_are_answered(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as harness:
        harness.store.path("b", harness.keys["b"].revision).write_bytes(b"damaged")
        with pytest.raises(AdapterLoadFailed, match="'b'"):
            await harness.engine.predict(harness.entries(("a", "x"), ("b", "x")))
        harness.keys["c"] = AdapterKey("c", "0" * 64)
        with pytest.raises(AdapterLoadFailed, match="'c'"):
            await harness.engine.predict(harness.entries(("c", "x")))
        entries = harness.entries(("a", "x"))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))
        assert harness.recorder.failures == [("adapter_load", 2), ("adapter_load", 1)]
        assert harness.engine.health().details["waiting_tokens"] == 0


async def test_a_request_over_the_limit_is_refused_as_a_whole_with_a_time_to_retry(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_waiting_tokens=60) as harness:
        held = await harness.hold_device()
        first = asyncio.create_task(
            harness.engine.predict(harness.entries(*(("a", "hello you"),) * 10))
        )
        await harness.until_waiting(10)
        before = harness.engine.health().details["waiting_tokens"]
        with pytest.raises(Overloaded) as refused:
            await harness.engine.predict(harness.entries(*(("a", "hello you"),) * 3))
        assert 0.0 < refused.value.retry_after < 10.0
        assert harness.engine.health().details["waiting_tokens"] == before
        with pytest.raises(TooLarge):
            await harness.engine.predict(harness.entries(("a", "win " * 100)))
        harness.device.release()
        await asyncio.gather(held, first)
        assert harness.recorder.failures == [("overloaded", 3)]


async def test_a_request_past_its_deadline_fails_at_once_and_is_never_run(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as harness:
        held = await harness.hold_device()
        started = monotonic()
        with pytest.raises(DeadlineExceeded):
            await harness.engine.predict(
                harness.entries(("b", "late"), ("a", "late")), deadline=started + 0.05
            )
        # The device is still busy: the caller did not have to wait for it.
        assert 0.05 <= monotonic() - started < 5.0
        assert harness.engine.health().details["waiting_entries"] == 0
        with pytest.raises(DeadlineExceeded):
            await harness.engine.predict(harness.entries(("a", "x")), deadline=monotonic() - 1.0)
        harness.device.release()
        await held
        assert harness.device.rows == [1]
        assert harness.recorder.failures == [("deadline", 2), ("deadline", 1)]


async def test_a_deadline_also_ends_the_wait_for_adapters(open_engine: OpenEngine) -> None:
    async with open_engine(max_active_adapters=1) as harness:
        held = await harness.hold_device()
        with pytest.raises(DeadlineExceeded):
            await harness.engine.predict(harness.entries(("b", "x")), deadline=monotonic() + 0.3)
        harness.device.release()
        await held
        entries = harness.entries(("b", "x"))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))


@pytest.mark.slow
async def test_the_wait_for_an_adapter_does_not_count_as_lateness_of_the_device(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_active_adapters=1, lanes=1) as harness:
        scheduler = harness.engine._scheduler
        for _ in range(50):
            # Where a full batch takes so long, 20 s are no time that is kept in any case.
            scheduler.measured(256, 10.0)
        held = await harness.hold_device()
        entries = harness.entries(("b", "x"))
        waits = asyncio.create_task(harness.engine.predict(entries, deadline=monotonic() + 20))
        # The slot is not free before the device is.
        await asyncio.sleep(1.0)
        harness.device.release()
        harness.assert_answered_as_alone(entries, await waits)
        await held
        assert scheduler._correction < 0.1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("a copy failed"), "batch_error"),
    ],
)
async def test_an_upload_that_the_device_cannot_take_says_so(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    async with open_engine() as harness:
        assert harness.engine._parts is not None
        file = harness.store.path("a", harness.keys["a"].revision)

        def fail(_: object) -> list[DeviceAdapter]:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(harness.engine._parts.runner, "load", fail)
            with pytest.raises(InferenceFailed) as failed:
                await harness.engine.check(file)
        assert failed.value.reason == reason
        assert (await harness.engine.check(file)).spec == harness.adapters["a"].spec


async def test_an_upload_that_comes_too_late_to_be_copied_hears_of_the_end(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as harness:
        file = harness.store.path("a", harness.keys["a"].revision)
        harness.engine._copying.shutdown()
        with pytest.raises(EngineUnavailable, match="has ended"):
            await harness.engine.check(file)


async def test_a_failing_batch_fails_only_its_own_rows_and_the_engine_goes_on(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_engine() as harness:
        harness.device.error = lambda: ValueError("secret path")
        with pytest.raises(InferenceFailed, match="ValueError") as failed:
            await harness.engine.predict(harness.entries(("a", "x"), ("b", "y")))
        assert failed.value.reason == "batch_error"
        # The cause is for the log, not for the caller.
        assert "secret" not in str(failed.value)
        assert "secret" in caplog.text
        harness.device.error = None
        entries = harness.entries(("a", "x"), ("b", "y"))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))
        assert harness.engine.health().ready


async def test_a_batch_too_large_for_the_memory_is_split_until_it_fits(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_batch_tokens=1024) as harness:
        harness.device.max_rows = 3
        entries = harness.entries(*(("abc"[i % 3], "win " * i) for i in range(11)))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))
        assert harness.device.rows == [11, 5, 2, 3, 6, 3, 3]
        assert [report.rows for report in harness.recorder.batches] == [11]


async def test_a_row_that_fails_does_not_take_the_others_of_its_batch_along(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_batch_tokens=1024) as harness:
        # The one text with this many tokens makes every batch fail that it is in.
        poison = harness.entries(("a", "win " * 29))
        length = len(poison[0].encoding)

        def fail_with_poison(batch: PackedBatch) -> None:
            if any(len(row.encoding) == length for row in batch.rows):
                raise RuntimeError("a kernel failed")

        harness.device.inspect = fail_with_poison
        held = await harness.hold_device()
        others = [harness.entries(("abc"[i % 3], "win " * i)) for i in range(11)]
        answers = [asyncio.create_task(harness.engine.predict(entries)) for entries in others]
        failing = asyncio.create_task(harness.engine.predict(poison))
        await harness.until_waiting(12)
        harness.device.release()
        await held
        for entries, answer in zip(others, answers, strict=True):
            harness.assert_answered_as_alone(entries, await answer)
        with pytest.raises(InferenceFailed, match="RuntimeError"):
            await failing


async def test_an_error_of_every_batch_is_not_retried_for_ever(open_engine: OpenEngine) -> None:
    async with open_engine(max_batch_tokens=2048) as harness:
        harness.device.rows.clear()
        harness.device.error = lambda: RuntimeError("a kernel failed")
        with pytest.raises(InferenceFailed):
            await harness.engine.predict(harness.entries(*(("a", "x"),) * 100))
        assert len(harness.device.rows) <= 32
        assert harness.engine.health().ready


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("runner.out_of_memory", "out_of_memory"),
        ("runner.kernel", "batch_error"),
        ("runner.not_finite", "not_finite"),
    ],
)
async def test_an_injected_fault_of_the_device_fails_its_requests_and_no_others(
    open_engine: OpenEngine, point: str, reason: str
) -> None:
    async with open_engine() as harness:
        entries = harness.entries(("a", "x"), ("b", "y"))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))
        install(lambda name: name == point)
        try:
            with pytest.raises(InferenceFailed) as failed:
                await harness.engine.predict(entries)
        finally:
            install(None)
        assert failed.value.reason == reason
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))
        assert harness.engine.health().ready


async def test_an_injected_fault_that_passes_is_not_seen(open_engine: OpenEngine) -> None:
    async with open_engine() as harness:
        passings = iter([True])
        install(lambda name: name == "runner.kernel" and next(passings, False))
        try:
            entries = harness.entries(("a", "x"), ("b", "y"), ("c", "win"))
            harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))
        finally:
            install(None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
async def test_a_single_row_without_memory_fails_alone(
    open_engine: OpenEngine, error: Exception
) -> None:
    async with open_engine() as harness:
        harness.device.error = lambda: error
        with pytest.raises(InferenceFailed, match="memory") as failed:
            await harness.engine.predict(harness.entries(("a", "x")))
        assert failed.value.reason == "out_of_memory"
        assert harness.engine.health().ready


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_real_lack_of_memory_splits_the_batch() -> None:
    """In a process with a limited address space, so that the allocator itself refuses."""
    code = """
        import resource, torch
        from adapters.adapter import prepare
        from service.engine.runners.packed import PackedRunner
        from service.engine.runners.base import BatchRow, RowFailure
        from tests.support.tiny_models import make_adapter, make_backbone
        torch.set_num_threads(1)
        backbone = make_backbone(max_tokens=512)
        runner = PackedRunner(backbone)
        adapter = prepare(make_adapter(backbone), backbone)
        text = backbone.encoder.encode("win " * 600, max_length=512)
        runner.launch([BatchRow(text, adapter)] * 2)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        # The generator's scores of one row are 512 * 512 floats, a megabyte, twice over.
        resource.setrlimit(resource.RLIMIT_AS, (used + 48 * 2**20, -1))
        result = runner.launch([BatchRow(text, adapter)] * 32).wait()
        assert result.passes > 1, result.passes
        assert not any(isinstance(item, RowFailure) for item in result.outcomes), result.outcomes
        assert len(result.outcomes) == 32
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


async def test_a_row_whose_scores_are_not_finite_fails_alone(open_engine: OpenEngine) -> None:
    async with open_engine() as harness:
        harness.add("bad", adapter_with_infinite_scores(harness.backbone))
        held = await harness.hold_device()
        entries = harness.entries(("b", "hello"), ("c", "you"))
        good = asyncio.create_task(harness.engine.predict(entries))
        bad = asyncio.create_task(harness.engine.predict(harness.entries(("bad", "hello"))))
        await harness.until_waiting(3)
        harness.device.release()
        harness.assert_answered_as_alone(entries, await good)
        with pytest.raises(InferenceFailed, match=r"^adapter 'bad': the scores are not finite$"):
            await bad
        await held
        # All in one batch, or the good rows would prove nothing.
        assert harness.device.rows == [1, 3]
        assert harness.recorder.failures == [("not_finite", 1)]


def engine_thread(before: set[threading.Thread]) -> int:
    """The engine's thread, which did not run before."""
    started = set(threading.enumerate()) - before
    (thread,) = [thread for thread in started if thread.name == "engine"]
    assert thread.ident is not None
    return thread.ident


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_when_the_thread_dies_every_request_fails_and_the_engine_is_not_live(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    # The thread's traceback is expected: keep it out of the test's output.
    caplog.set_level(logging.CRITICAL, logger="service.engine.device")
    before = set(threading.enumerate())
    async with open_engine(max_active_adapters=1) as harness:
        held = await harness.hold_device()
        queued = asyncio.create_task(harness.engine.predict(harness.entries(("a", "x"))))
        for_a_slot = asyncio.create_task(harness.engine.predict(harness.entries(("b", "x"))))
        await harness.until_waiting(1)
        killed = ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(engine_thread(before)), ctypes.py_object(SystemExit)
        )
        assert killed == 1
        harness.device.release()
        answers = await asyncio.gather(held, queued, for_a_slot, return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineUnavailable] * 3
        health = harness.engine.health()
        assert not health.live
        assert not health.ready
        assert "died" in str(health.reason)
        with pytest.raises(EngineUnavailable, match="died"):
            await harness.engine.predict(harness.entries(("a", "x")))
        await asyncio.wait_for(harness.engine.drain(), 1)


async def test_an_error_that_loses_the_device_ends_the_engine(open_engine: OpenEngine) -> None:
    async with open_engine() as harness:
        harness.device.error = lambda: torch.AcceleratorError("an illegal memory access")
        with pytest.raises(EngineUnavailable, match="illegal memory access"):
            await harness.engine.predict(harness.entries(("a", "x")))
        assert not harness.engine.health().live


async def test_while_a_batch_hangs_the_engine_is_not_live(open_engine: OpenEngine) -> None:
    async with open_engine(stall_seconds=0.05) as harness:
        held = await harness.hold_device()
        await asyncio.sleep(0.1)
        health = harness.engine.health()
        assert not health.live
        assert not health.ready
        assert "running" in str(health.reason)
        harness.device.release()
        await held
        assert harness.engine.health().ready
