"""The service under test: `python -m service serve`, as processes, again on one port."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0
FAULTS_VARIABLE = "ID_SPAM_TEST_FAULTS"
_ENDING_SECONDS = 10.0
_ENGINE_NAME = "idspam-engine"


class ServiceFailed(Exception):
    """The service did not start or end as it should; the message has the end of its log."""


class Service:
    """One service in a folder of its own, started and ended any number of times.

    Args:
        folder: for its store, log and sockets; `faults` in it is read at every fault point.
        workers: 0 is a service in one process.
        devices: each of them is the CPU, with an engine of its own; several need workers.
        environment: settings with their prefix, and whatever else its processes get.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int,
        environment: Mapping[str, str],
        store: Path | None = None,
        devices: int = 1,
    ) -> None:
        self.folder = folder
        self.workers = workers
        self.devices = devices
        self.store = store or folder / "store"
        self.log = folder / "log"
        self.faults = folder / "faults"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        sockets = folder / "t"
        sockets.mkdir(parents=True, exist_ok=True)
        kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        self._environment = (
            kept
            | {
                "HF_HUB_OFFLINE": "1",
                "TMPDIR": str(sockets),
                "IDSPAM_PORT": str(self.port),
                "IDSPAM_WORKERS": str(workers),
                "IDSPAM_ADAPTER_DIR": str(self.store),
                "IDSPAM_ZOO_DIR": "off",
                "IDSPAM_DEVICE": ",".join(["cpu"] * devices),
                FAULTS_VARIABLE: str(self.faults),
            }
            | dict(environment)
        )
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it and return when it is ready.

        Raises:
            ServiceFailed: it ends, or is not ready in time.
        """
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "service",
                "serve",
                cwd=TREE,
                env=self._environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                line = await self._process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line.startswith(b"serving "):
            await self.kill()
            raise ServiceFailed(f"the service did not start: {self._end_of_log()}")

    async def terminate(self) -> float:
        """SIGTERM; returns the seconds until it has ended.

        Raises:
            ServiceFailed: its status is not 0.
        """
        assert self._process is not None
        began = time.monotonic()
        self._process.terminate()
        status = await self._process.wait()
        if status:
            raise ServiceFailed(f"status {status} after SIGTERM: {self._end_of_log()}")
        return time.monotonic() - began

    async def kill(self) -> None:
        """SIGKILL to all its processes at once."""
        if self._process is None:
            return
        for pid in [self._process.pid, *self.children().values()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self._process.wait()
        # Until the last one is gone the port is taken.
        until = time.monotonic() + _ENDING_SECONDS
        while self._left() and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def children(self) -> dict[str, int]:
        """Process ids by name: engine, engine-1, standby, worker-0, ..."""
        pids = {}
        for pid, arguments in _processes():
            context = _context_of(arguments)
            if context is not None and context["supervisor"] == self.pid:
                pids[_engine_name(pid) or str(context["name"])] = pid
        return pids

    def processes(self) -> dict[str, int]:
        """All its processes by name; one alone is called `service`."""
        return {"supervisor" if self.workers else "service": self.pid, **self.children()}

    def inject(self, *lines: str) -> None:
        """From now on fail at these points (`adapters.faults`), in all processes."""
        written = self.faults.with_suffix(".new")
        written.write_text("".join(f"{line}\n" for line in lines))
        written.replace(self.faults)

    def heal(self) -> None:
        self.faults.unlink(missing_ok=True)

    def _left(self) -> list[int]:
        mine = f'"folder":"{self.folder}'
        return [pid for pid, arguments in _processes() if any(mine in each for each in arguments)]

    def _end_of_log(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _engine_name(pid: int) -> str:
    """The name of an engine that was forked from the standby, whose arguments it still has."""
    try:
        before, forked, number = Path(f"/proc/{pid}/comm").read_text().partition(_ENGINE_NAME)
    except OSError:
        return ""
    number = number.strip()
    return "" if before or not forked else f"engine-{number}" if number else "engine"


def _context_of(arguments: list[str]) -> dict[str, object] | None:
    if arguments[1:3] != ["-m", "service.ipc"] or len(arguments) < 5:
        return None
    context: dict[str, object] = json.loads(arguments[4])
    return context


def _processes() -> list[tuple[int, list[str]]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found.append((int(folder.name), arguments))
    return found
