"""A process under the supervisor, from both sides: `Child` keeps one running, `ChildContext` is
what the process itself knows and does.

Each child process holds the only writing end of a pipe. It writes there that it is ready, or why it
failed, and a beat every half second; however it ends, the pipe ends with it.
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
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from service.devices import own_device
from service.observability.logs import configure_logging
from service.settings import Settings, read_settings

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
# A process ends when its event loop is stuck for this long.
STALL_SECONDS = 60.0
# A ready process is killed when it has sent no beat for this long and meanwhile hardly used the
# processor: it is stopped or in a deadlock. One that is only slow, because the machine is loaded,
# uses what it gets.
HUNG_SECONDS = 5.0
# Of a beat. The system counts in ticks of 0.01 s.
_BUSY_SECONDS = 0.015

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
# So many in a row come after the first pause; then the pauses double.
_QUICK_RESTARTS = 3
# A process that was ready for this long does not count as failing again and again.
_STEADY_SECONDS = 10.0

_BEAT = b"beat\n"


class ChildContext(msgspec.Struct, frozen=True):
    """What a child process gets after its kind, in JSON; settings are in the environment.

    name: in logs. folder: of the sockets. supervisor: process id. report: the pipe's descriptor.
    number: a worker's, or an engine's among those of all devices. device: an engine's. engines: how
    many there are. host, port, url: a worker's. requests: a standby's socket.
    """

    name: str
    folder: str
    supervisor: int
    report: int
    number: int = 0
    host: str = ""
    port: int = 0
    url: str = ""
    requests: int = -1
    device: str = ""
    engines: int = 1

    @property
    def engine_endpoints(self) -> list[str]:
        """Where the engines take requests; the first of them has the catalog."""
        further = (f"ipc://{self.folder}/engine-{index}" for index in range(1, self.engines))
        return [f"ipc://{self.folder}/engine", *further]

    @property
    def supervisor_endpoint(self) -> str:
        return f"ipc://{self.folder}/supervisor"

    def ready(self, line: str) -> None:
        """Report to the supervisor that this process works. line: what it may print."""
        self._report("ready", line)

    def failed(self, reason: str) -> None:
        """Report to the supervisor why this process cannot work."""
        self._report("failed", reason)

    def beat(self) -> None:
        """Report to the supervisor that this process does not hang."""
        # The pipe is full where the supervisor is stopped, and broken where it has ended.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self.report, _BEAT)

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
                self.beat()
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _report(self, kind: Literal["ready", "failed"], text: str) -> None:
        line = f"{kind} {' '.join(text.split())}".encode("utf-8", "replace")
        # Up to this length a write to a pipe is atomic.
        os.write(self.report, line[: select.PIPE_BUF - 1] + b"\n")


def begin() -> tuple[ChildContext, Settings]:
    """What this process was started with; also sets up its log."""
    return begin_as(msgspec.json.decode(sys.argv[2], type=ChildContext))


def begin_as(context: ChildContext) -> tuple[ChildContext, Settings]:
    """The same for a process that was forked and has no arguments of its own."""
    # No other process may inherit the pipe: its end tells the supervisor that this one has ended.
    os.set_inheritable(context.report, False)
    os.set_blocking(context.report, False)
    settings = read_settings(os.environ)
    if context.device:
        settings = replace(settings, device=own_device(context.device, context.engines))
    configure_logging(settings.log_level, settings.log_format, process=context.name)
    return context, settings


Kind = Literal["engine", "standby", "worker"]


class NeverReady(Exception):
    """The first process of a child ended before it was ready; the message says why."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Called for every process of a child. begun: with its id. ready: with its line."""

    begun: Callable[["Child", int], None]
    ready: Callable[["Child", str], None]
    ended: Callable[["Child"], None]


class Running(Protocol):
    """A process that was started, as `subprocess.Popen`. Only `wait` collects its status."""

    @property
    def pid(self) -> int: ...

    def send_signal(self, sig: int) -> None:
        """Does nothing once the process was waited for."""

    def wait(self) -> int:
        """The exit status, or the negative number of the signal that ended it."""


# Starts a process with a context whose `report` it inherits. Raises OSError if it cannot.
Launch: TypeAlias = Callable[[ChildContext], Awaitable[Running]]


def command_of(kind: Kind, context: ChildContext) -> list[str]:
    """The command line of a process that runs `service.ipc.{kind}_process`."""
    argument = msgspec.json.encode(context).decode()
    return [sys.executable, "-m", "service.ipc", kind, argument]


async def launch_module(
    kind: Kind,
    context: ChildContext,
    *inherited: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Running:
    """Start a process of this kind, which inherits these descriptors and its report.

    Raises:
        OSError: it cannot be started.
    """
    command = command_of(kind, context)
    # Takes milliseconds: it waits for the program to be loaded, not for its work.
    return subprocess.Popen(  # noqa: ASYNC220
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=(context.report, *inherited),
        env={**os.environ, **environment},
        # Ctrl-C in a terminal goes to the supervisor alone, which ends them in order.
        process_group=0,
    )


@dataclass(slots=True)
class _Reports:
    """What one process reported. ready_since: on the clock of `time.monotonic`."""

    ready_since: float | None = None
    failure: str = ""
    beats: int = 0


@dataclass(slots=True, eq=False)
class Child:
    """Keeps one process running, for as long as `keep` runs.

    context: what its processes are started with, except for their pipe. launch: starts one; the
    default starts the module of this kind.
    """

    kind: Kind
    context: ChildContext
    callbacks: Callbacks
    launch: Launch | None = None
    was_ready: bool = False
    _process: Running | None = None
    _reason: str = ""
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    # What ends a process that is being started while this child is stopped.
    _ending: signal.Signals = signal.SIGTERM

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
            doublings = max(0, failures - _QUICK_RESTARTS)
            pause = min(_FIRST_PAUSE_SECONDS * 2**doublings, _LONGEST_PAUSE_SECONDS)
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
        self._ending = signal.SIGKILL
        self._signal(signal.SIGKILL)

    def replace(self) -> None:
        """End the process at once; another one is started."""
        self._signal(signal.SIGKILL)

    async def _run(self) -> bool:
        """Run one process to its end; returns whether it was ready for long."""
        reading, writing = os.pipe()
        context = msgspec.structs.replace(self.context, report=writing)
        try:
            launch = self.launch or partial(launch_module, self.kind)
            self._process = process = await launch(context)
        except OSError as error:
            os.close(reading)
            self._reason = f"{self.name} cannot be started: {error.strerror or error}"
            return False
        finally:
            os.close(writing)
        if self._stopping.is_set():
            self._signal(self._ending)
        self.callbacks.begun(self, process.pid)
        reports = _Reports()
        watching = asyncio.create_task(self._end_if_hung(process, reports))
        await self._listen(reading, reports)
        watching.cancel()
        # The process has ended with the pipe. If it somehow has not, nothing would watch it.
        process.send_signal(signal.SIGKILL)
        status = await asyncio.to_thread(process.wait)
        self._process = None
        self.callbacks.ended(self)
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        self._reason = reports.failure or f"{self.name} ended with {ended}"
        since = reports.ready_since
        return since is not None and monotonic() - since > _STEADY_SECONDS

    async def _listen(self, pipe: int, reports: _Reports) -> None:
        """Take down what a process reports, until it ends."""
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: protocol, os.fdopen(pipe, "rb", 0)
        )
        try:
            async for line in reader:
                if line == _BEAT:
                    reports.beats += 1
                    continue
                kind, _, text = line.decode("utf-8", "replace").strip().partition(" ")
                if kind == "ready":
                    self.was_ready, reports.ready_since = True, monotonic()
                    self.callbacks.ready(self, text)
                elif kind == "failed":
                    reports.failure = text
        finally:
            transport.close()

    async def _end_if_hung(self, process: Running, reports: _Reports) -> None:
        """Kill the process once it has been ready and then hung for `HUNG_SECONDS`."""
        silent, beats, used = 0.0, reports.beats, usage_of(process.pid)
        while silent < HUNG_SECONDS:
            await asyncio.sleep(BEAT_SECONDS)
            before, used = used, usage_of(process.pid)
            # Only turns of this loop count: time in which this process did not run either, on a
            # machine that is loaded or was suspended, says nothing about the other one.
            lively = before is None or used is None or used.active_since(before) > _BUSY_SECONDS
            if lively or reports.beats != beats or reports.ready_since is None:
                silent, beats = 0.0, reports.beats
            else:
                silent += BEAT_SECONDS
        reports.failure = f"{self.name} hung: no sign of life for {HUNG_SECONDS:.0f} seconds"
        process.send_signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)


# Fields of /proc/<pid>/stat, counted from the end of the name, which may contain spaces.
_USER, _SYSTEM, _RESIDENT = 11, 12, 21


class Usage(NamedTuple):
    """waited_seconds: how long its main thread was ready to run and had no processor."""

    resident_bytes: int
    cpu_seconds: float
    waited_seconds: float = 0.0

    def active_since(self, before: "Usage") -> float:
        """Seconds in which it ran, or would have if the machine had been less loaded."""
        ran = self.cpu_seconds - before.cpu_seconds
        return ran + self.waited_seconds - before.waited_seconds


def usage_of(process: int) -> Usage | None:
    """What a process uses; None if it has ended, or the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    try:
        waited = int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        waited = 0.0
    return Usage(
        resident_bytes=int(fields[_RESIDENT]) * os.sysconf("SC_PAGE_SIZE"),
        cpu_seconds=(int(fields[_USER]) + int(fields[_SYSTEM])) / os.sysconf("SC_CLK_TCK"),
        waited_seconds=waited,
    )
