"""What a child of the supervisor is started with, reports to it, and watches. Knows no socket."""

import asyncio
import faulthandler
import logging
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from service.logs import configure_logging
from service.settings import Settings, read_settings

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
