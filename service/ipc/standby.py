"""The supervisor's side of the standby: engine processes are forked from one that has the backbone
loaded.

A start takes three seconds of imports on an idle machine, and several times as long while the
workers are busy; a fork takes 20 ms. A forked engine is a child of the supervisor like any other:
its parent ends at once, and orphans below the supervisor come to it, not to process 1.
"""

import asyncio
import ctypes
import os
import socket
import sys
import threading
from dataclasses import dataclass, field

import msgspec

from service.ipc.child import Callbacks, Child, ChildContext, Running, launch_module

# A standby takes milliseconds to fork, unless it was stopped.
_FORK_SECONDS = 5.0
# OpenBLAS starts its threads when numpy is imported, and a process with threads cannot fork safely.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
_PR_SET_CHILD_SUBREAPER = 36
MAX_MESSAGE_BYTES = 65536


class Forked(msgspec.Struct, frozen=True):
    """The standby's answer. process: of the new engine; 0 if there is none. reason: why."""

    process: int
    reason: str = ""


def adopt_orphans() -> bool:
    """Make this process the parent of its descendants' orphans; returns whether the system can."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    return bool(library.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


@dataclass(slots=True)
class ForkedProcess:
    """A process that this one has adopted. Its id stays its own until `wait` has returned."""

    pid: int
    _status: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send_signal(self, sig: int) -> None:
        with self._lock:
            if self._status is None:
                os.kill(self.pid, sig)

    def wait(self) -> int:
        # Its status is collected under the lock: afterwards the id may be another process's.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            if self._status is None:
                self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self._status


class Standby:
    """Keeps a standby process running, and launches engines from it.

    Args:
        context: of the standby process.
        callbacks: of the standby process.
    """

    def __init__(self, context: ChildContext, callbacks: Callbacks) -> None:
        self.child = Child("standby", context, callbacks, self._launch)
        self._socket: socket.socket | None = None
        self._forking = asyncio.Lock()
        self._ready = asyncio.Event()
        self._stopped = False

    def ready(self) -> None:
        """The standby process is ready to fork."""
        self._ready.set()

    def ended(self) -> None:
        """The standby process has ended."""
        self._close()
        if not self._stopped:
            self._ready.clear()

    def stop(self) -> None:
        """End the standby process; launches that wait for it fail."""
        self._stopped = True
        self._ready.set()
        self.child.stop()

    def kill(self) -> None:
        """The same at once."""
        self._stopped = True
        self._ready.set()
        self.child.kill()

    async def fork(self, context: ChildContext) -> Running:
        """Launch an engine as soon as the standby process is ready: `service.ipc.child.Launch`.

        Raises:
            OSError: it could not fork, or the standby is stopped.
        """
        async with self._forking:
            await self._ready.wait()
            if self._stopped or self._socket is None:
                raise OSError("the standby has ended")
            try:
                forked = await asyncio.to_thread(_ask, self._socket, context)
            except (OSError, msgspec.DecodeError) as error:
                # Its answer might still come, and be taken for the answer to another question.
                self._ready.clear()
                self.child.replace()
                raise OSError(f"the standby did not answer: {error}") from None
        if not forked.process:
            raise OSError(forked.reason)
        return ForkedProcess(forked.process)

    async def _launch(self, context: ChildContext) -> Running:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_FORK_SECONDS)
        context = msgspec.structs.replace(context, requests=theirs.fileno())
        with theirs:
            try:
                running = await launch_module(
                    "standby", context, theirs.fileno(), environment=_ONE_THREAD
                )
            except OSError:
                ours.close()
                raise
        self._close()
        self._socket = ours
        return running

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _ask(standby: socket.socket, context: ChildContext) -> Forked:
    socket.send_fds(standby, [msgspec.json.encode(context)], [context.report])
    return msgspec.json.decode(standby.recv(MAX_MESSAGE_BYTES), type=Forked)
