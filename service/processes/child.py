"""One process under the supervisor: started, listened to, replaced when it ends. Knows no socket.

Each child holds the only writing end of a pipe. On it it says that it is ready, or why it cannot
be; its end, however it comes, is the end of the pipe.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

import msgspec

from service.processes.part import Part

logger = logging.getLogger(__name__)

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
        command = [sys.executable, "-m", f"service.processes.{self.kind}"]
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
