"""Memory and processor time of other processes, where the system shows them in /proc."""

import os
from pathlib import Path
from typing import NamedTuple

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
