"""What every child process watches: its event loop, and whether its supervisor is alive; and what
the supervisor watches: whether it shows signs of life."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from service.ipc import child
from service.ipc.child import Callbacks, Child, ChildContext, Running
from tests.support.service_process import TREE

WATCHING = """
import asyncio, os, time
from service.ipc import child

child.BEAT_SECONDS, child.STALL_SECONDS = 0.1, 0.6

async def main():
    report = os.open(os.devnull, os.O_WRONLY)
    context = child.ChildContext("x", {folder!r}, {supervisor}, report)
    watching = asyncio.create_task(context.watch(lambda: None))
    await asyncio.sleep(1.0)
    print("alive", flush=True)
    time.sleep(20)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
"""


def watched(folder: Path, supervisor: str) -> subprocess.CompletedProcess[str]:
    code = WATCHING.format(folder=str(folder), supervisor=supervisor)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=15)


@pytest.mark.slow
def test_a_stuck_event_loop_ends_its_process_and_shows_where(tmp_path: Path) -> None:
    ended = watched(tmp_path, "os.getppid()")
    assert ended.returncode == 1
    assert ended.stdout == "alive\n"
    assert "Timeout" in ended.stderr
    assert "in main" in ended.stderr


def test_a_child_without_its_supervisor_ends_itself(tmp_path: Path) -> None:
    ended = watched(tmp_path, "os.getpid()")
    assert ended.returncode == -signal.SIGTERM
    assert ended.stdout == ""


def test_an_orphan_removes_the_folder_and_nobody_else_does(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    ChildContext("x", str(folder), os.getppid(), -1).tidy()
    assert folder.is_dir()
    ChildContext("x", str(folder), os.getpid(), -1).tidy()
    assert not folder.exists()


@pytest.mark.parametrize("reason", ["short", "two\nlines", "long " * 10_000, "\udcff"])
def test_whatever_a_child_reports_is_one_line_that_fits_into_a_pipe(reason: str) -> None:
    reading, writing = os.pipe()
    try:
        ChildContext("x", "", 0, writing).failed(reason)
        line = os.read(reading, 2**20)
    finally:
        os.close(reading)
        os.close(writing)
    assert line.startswith(b"failed ")
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert len(line) <= select.PIPE_BUF


REPORTING = """
import os, sys, time
os.write(int(sys.argv[1]), b"ready\\n")
until = time.monotonic() + 20
while time.monotonic() < until:
    {turn}
"""


async def kept(turn: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, str]:
    """Whether a ready process that does this in every turn was killed as hung, and the reason."""
    monkeypatch.setattr(child, "HUNG_SECONDS", 1.0)
    ended = asyncio.Event()

    async def launch(context: ChildContext) -> Running:
        return subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", REPORTING.format(turn=turn), str(context.report)],
            pass_fds=(context.report,),
        )

    ignore: Any = lambda *_: None  # noqa: E731
    callbacks = Callbacks(ignore, ignore, lambda _: ended.set())
    kept = Child("worker", ChildContext("x", "", os.getpid(), -1), callbacks, launch)
    keeping = asyncio.create_task(kept.keep())
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await ended.wait()
    hung = ended.is_set()
    kept.kill()
    await keeping
    return hung, kept._reason


@pytest.mark.slow
async def test_a_process_that_sleeps_without_a_beat_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await kept("time.sleep(20)", 10, monkeypatch) == (
        True,
        "x hung: no sign of life for 1 seconds",
    )


@pytest.mark.slow
async def test_a_process_that_is_only_busy_is_not_taken_for_hung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (await kept("pass", 4, monkeypatch))[0] is False
