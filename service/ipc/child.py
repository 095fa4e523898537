"""One process under the supervisor: started, listened to, replaced when it ends. Knows no socket.

Each child holds the only writing end of a pipe. On it it says that it is ready, or why it cannot
be; its end, however it comes, is the end of the pipe.
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

# --- merged from service.processes.part

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
# An event loop that stands still for so long ends its process.
STALL_SECONDS = 60.0


class Part(msgspec.Struct, frozen=True):
    """A child's one argument, as JSON; its settings are in the environment.

    name: in logs. folder: where the sockets are. supervisor: process id. report: descriptor of a
    pipe. number, host, port, url: a worker's.
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
        """Tell the supervisor that this part works. line: what it may print."""
        self._tell("ready", line)

    def failed(self, reason: str) -> None:
        """Tell it why this part cannot work."""
        self._tell("failed", reason)

    def orphaned(self) -> bool:
        return os.getppid() != self.supervisor

    def tidy(self) -> None:
        """Remove what the supervisor would have removed if it still were there."""
        if self.orphaned():
            shutil.rmtree(Path(self.folder), ignore_errors=True)

    async def watch(self, check: Callable[[], None]) -> None:
        """Beat until cancelled: end when orphaned, or when the loop stands still.

        Args:
            check: called every beat, for what else keeps the part from ending.
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

    def _tell(self, what: str, line: str) -> None:
        said = f"{what} {' '.join(line.split())}".encode("utf-8", "replace")
        # Written whole or not at all.
        os.write(self.report, said[: select.PIPE_BUF - 1] + b"\n")


def begin() -> tuple[Part, Settings]:
    """What this process was started with; its log is set up."""
    part = msgspec.json.decode(sys.argv[1], type=Part)
    # Only this process may hold the pipe: its end is how the supervisor sees the end of the part.
    os.set_inheritable(part.report, False)
    settings = read_settings(os.environ)
    configure_logging(settings.log_level, settings.log_format, process=part.name)
    return part, settings


# --- merged from service.processes.child


Kind = Literal["engine", "worker"]

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
# Who was ready for so long is not failing in a row.
_STEADY_SECONDS = 30.0


class NeverReady(Exception):
    """The first process of a child ended before it was ready; the message says why."""


@dataclass(frozen=True, slots=True)
class Watcher:
    """Told of every process of a child. begun: with its id. ready: with its line."""

    begun: Callable[["Child", int], None]
    ready: Callable[["Child", str], None]
    ended: Callable[["Child"], None]


@dataclass(slots=True)
class _Heard:
    """What one process said of itself. ready_since: of `time.monotonic`."""

    ready_since: float | None = None
    reason: str = ""


@dataclass(slots=True, eq=False)
class Child:
    """Runs as long as its `keep` does.

    part: what its processes are started with, but for their pipe.
    """

    kind: Kind
    part: Part
    watcher: Watcher
    was_ready: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _reason: str = ""
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def keep(self) -> None:
        """Have a process run until `stop`, and another whenever one ends.

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
            logger.error(
                "%s ended: %s; another in %.1f seconds", self.part.name, self._reason, pause
            )
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
                return
            except TimeoutError:
                pass

    def stop(self) -> None:
        """Ask the process to end, for good."""
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._stopping.set()
        self._signal(signal.SIGKILL)

    async def _run(self) -> bool:
        """One process to its end; says whether it was ready for long."""
        reading, writing = os.pipe()
        part = msgspec.structs.replace(self.part, report=writing)
        command = [sys.executable, "-m", f"service.ipc.{self.kind}"]
        try:
            # Milliseconds: it waits for the program to be there, not for what it does.
            self._process = process = subprocess.Popen(  # noqa: ASYNC220
                [*command, msgspec.json.encode(part).decode()],
                stdin=subprocess.DEVNULL,
                pass_fds=(writing,),
                # Ctrl-C in a terminal is for the supervisor, which ends them in order.
                process_group=0,
            )
        except OSError as error:
            os.close(reading)
            self._reason = f"{self.part.name} cannot be started: {error.strerror}"
            return False
        finally:
            os.close(writing)
        self.watcher.begun(self, process.pid)
        heard = await self._listen(reading)
        # The pipe has ended, and so has the process; were it not so, nobody would hear of it again.
        process.kill()
        status = await asyncio.to_thread(process.wait)
        self._process = None
        self.watcher.ended(self)
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        self._reason = heard.reason or f"{self.part.name} ended with {ended}"
        since = heard.ready_since
        return since is not None and monotonic() - since > _STEADY_SECONDS

    async def _listen(self, pipe: int) -> _Heard:
        """All that a process says until it ends."""
        heard = _Heard()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: protocol, os.fdopen(pipe, "rb", 0)
        )
        try:
            async for line in reader:
                what, _, said = line.decode("utf-8", "replace").strip().partition(" ")
                if what == "ready":
                    self.was_ready, heard.ready_since = True, monotonic()
                    self.watcher.ready(self, said)
                elif what == "failed":
                    heard.reason = said
        finally:
            transport.close()
        return heard

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)


# --- merged from service.processes.usage

# Fields of /proc/<pid>/stat, counted from behind the name, which may hold spaces.
_USER, _SYSTEM, _RESIDENT = 11, 12, 21


class Usage(NamedTuple):
    resident_bytes: int
    cpu_seconds: float


def usage_of(process: int) -> Usage | None:
    """What a process has used; None if it is gone, or the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Usage(
        resident_bytes=int(fields[_RESIDENT]) * os.sysconf("SC_PAGE_SIZE"),
        cpu_seconds=(int(fields[_USER]) + int(fields[_SYSTEM])) / os.sysconf("SC_CLK_TCK"),
    )
