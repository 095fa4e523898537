"""Steps of the system's clock, in the eyes of the service alone.

libfaketime (Debian's package of that name) shifts what the processes of one service see of the
system's clock, and leaves the monotonic clock alone, as a real step does.
"""

import asyncio
from pathlib import Path

from chaos.faults import Fault, Lab

NAME = "the clock steps"
_LIBRARY = "libfaketimeMT.so.1"
# libfaketime makes an error of a sleep whose end has passed when it begins (EINVAL), so on a busy
# machine a process of the service may fail while it starts.
STARTS = 3
_STEPS = ("+3600", "-86400", "+315360000", "-7200", "+0")


def library() -> Path | None:
    """Where libfaketime is installed."""
    return next(iter(sorted(Path("/usr/lib").glob(f"**/{_LIBRARY}"))), None)


def environment(library: Path, file: Path) -> dict[str, str]:
    """For a service whose clock is shifted by the seconds in a file."""
    file.write_text("+0\n")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def steps(file: Path) -> Fault:
    async def fault(lab: Lab) -> None:
        for step in _STEPS[: max(2, lab.times(len(_STEPS)))]:

            async def inject(step: str = step) -> None:
                written = file.with_suffix(".new")
                written.write_text(f"{step}\n")
                written.replace(file)
                # A lease or a deadline on this clock would end, or never end.
                await asyncio.sleep(1.0)
                await lab.put_until_accepted("clock", lab.answers.version())

            await lab.shot(inject)

    return fault
