"""A process under the supervisor, from both sides: `Child` keeps one running, `ChildContext` is
what the process itself knows and does.

Each child process holds the only writing end of a pipe. It writes there that it is ready, or why it
failed; however it ends, the pipe ends with it.
"""

import asyncio
import faulthandler
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Literal, NamedTuple

import msgspec

from service.observability.logs import configure_logging
from service.settings import Settings, read_settings

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
# A process ends when its event loop is stuck for this long.
STALL_SECONDS = 60.0

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
# A process that was ready for this long does not count as failing again and again.
_STEADY_SECONDS = 30.0


class ChildContext(msgspec.Struct, frozen=True):
    """What a child process gets as its one argument, in JSON; settings are in the environment.

    name: in logs. folder: of the sockets. supervisor: process id. report: the pipe's descriptor.
    number, host, port, url: a worker's.
    """

    name: str
    folder: str
    supervisor: int
    report: int
    number: int = 0
    host: str = ""
    port: int = 0
    url: str = ""

    @property
    def engine_endpoint(self) -> str:
        return f"ipc://{self.folder}/engine"

    @property
    def supervisor_endpoint(self) -> str:
        return f"ipc://{self.folder}/supervisor"

    def ready(self, line: str) -> None:
        """Report to the supervisor that this process works. line: what it may print."""
        self._report("ready", line)

    def failed(self, reason: str) -> None:
        """Report to the supervisor why this process cannot work."""
        self._report("failed", reason)

    def orphaned(self) -> bool:
        return os.getppid() != self.supervisor

    def tidy(self) -> None:
        """Remove the folder if the supervisor is gone, which would have done so."""
        if self.orphaned():
            shutil.rmtree(Path(self.folder), ignore_errors=True)

    async def watch(self, check: Callable[[], None]) -> None:
        """Run until cancelled; end the process when it is orphaned or its event loop is stuck.

        Args:
            check: called every beat; may end the process for other reasons.
        """
        try:
            while True:
                faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
                if self.orphaned():
                    logger.error("the supervisor is gone: this process ends too")
                    signal.raise_signal(signal.SIGTERM)
                    return
                check()
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _report(self, kind: Literal["ready", "failed"], text: str) -> None:
        line = f"{kind} {' '.join(text.split())}".encode("utf-8", "replace")
        # Up to this length a write to a pipe is atomic.
        os.write(self.report, line[: select.PIPE_BUF - 1] + b"\n")


def begin() -> tuple[ChildContext, Settings]:
    """What this process was started with; also sets up its log."""
    context = msgspec.json.decode(sys.argv[1], type=ChildContext)
    # No other process may inherit the pipe: its end tells the supervisor that this one has ended.
    os.set_inheritable(context.report, False)
    settings = read_settings(os.environ)
    configure_logging(settings.log_level, settings.log_format, process=context.name)
    return context, settings


Kind = Literal["engine", "worker"]


class NeverReady(Exception):
    """The first process of a child ended before it was ready; the message says why."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Called for every process of a child. begun: with its id. ready: with its line."""

    begun: Callable[["Child", int], None]
    ready: Callable[["Child", str], None]
    ended: Callable[["Child"], None]


@dataclass(slots=True)
class _Reports:
    """What one process reported. ready_since: on the clock of `time.monotonic`."""

    ready_since: float | None = None
    failure: str = ""


@dataclass(slots=True, eq=False)
class Child:
    """Keeps one process running, for as long as `keep` runs.

    context: what its processes are started with, except for their pipe.
    """

    kind: Kind
    context: ChildContext
    callbacks: Callbacks
    was_ready: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _reason: str = ""
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.context.name

    async def keep(self) -> None:
        """Run a process until `stop`, and another one whenever it ends.

        Raises:
            NeverReady: the first one ended before it was ready.
        """
        failures = 0
        while not self._stopping.is_set():
            steady = await self._run()
            if self._stopping.is_set():
                return
            if not self.was_ready:
                raise NeverReady(self._reason)
            failures = 0 if steady else failures + 1
            pause = min(_FIRST_PAUSE_SECONDS * 2**failures, _LONGEST_PAUSE_SECONDS)
            logger.error("%s ended: %s; restart in %.1f seconds", self.name, self._reason, pause)
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
                return
            except TimeoutError:
                pass

    def stop(self) -> None:
        """Ask the process to end, and start no other."""
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once, and start no other."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    async def _run(self) -> bool:
        """Run one process to its end; returns whether it was ready for long."""
        reading, writing = os.pipe()
        context = msgspec.structs.replace(self.context, report=writing)
        command = [sys.executable, "-m", f"service.ipc.{self.kind}_process"]
        try:
            # Takes milliseconds: it waits for the program to be loaded, not for its work.
            self._process = process = subprocess.Popen(  # noqa: ASYNC220
                [*command, msgspec.json.encode(context).decode()],
                stdin=subprocess.DEVNULL,
                pass_fds=(writing,),
                # Ctrl-C in a terminal goes to the supervisor alone, which ends them in order.
                process_group=0,
            )
        except OSError as error:
            os.close(reading)
            self._reason = f"{self.name} cannot be started: {error.strerror}"
            return False
        finally:
            os.close(writing)
        self.callbacks.begun(self, process.pid)
        reports = await self._listen(reading)
        # The process has ended with the pipe. If it somehow has not, nothing would watch it.
        process.kill()
        status = await asyncio.to_thread(process.wait)
        self._process = None
        self.callbacks.ended(self)
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        self._reason = reports.failure or f"{self.name} ended with {ended}"
        since = reports.ready_since
        return since is not None and monotonic() - since > _STEADY_SECONDS

    async def _listen(self, pipe: int) -> _Reports:
        """Everything that a process reports until it ends."""
        reports = _Reports()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: protocol, os.fdopen(pipe, "rb", 0)
        )
        try:
            async for line in reader:
                kind, _, text = line.decode("utf-8", "replace").strip().partition(" ")
                if kind == "ready":
                    self.was_ready, reports.ready_since = True, monotonic()
                    self.callbacks.ready(self, text)
                elif kind == "failed":
                    reports.failure = text
        finally:
            transport.close()
        return reports

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)


# Fields of /proc/<pid>/stat, counted from the end of the name, which may contain spaces.
_USER, _SYSTEM, _RESIDENT = 11, 12, 21


class Usage(NamedTuple):
    resident_bytes: int
    cpu_seconds: float


def usage_of(process: int) -> Usage | None:
    """What a process uses; None if it has ended, or the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Usage(
        resident_bytes=int(fields[_RESIDENT]) * os.sysconf("SC_PAGE_SIZE"),
        cpu_seconds=(int(fields[_USER]) + int(fields[_SYSTEM])) / os.sysconf("SC_CLK_TCK"),
    )
