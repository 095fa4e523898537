"""Processor time of a service, by kind of process, and how many requests it has answered."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from benchmarks.memory import family

_TICKS = os.sysconf("SC_CLK_TCK")
_KIND = re.compile(r"-m\0service\.ipc\0(\w+)\0")
_ANSWERED = re.compile(r"^idspam_requests_total\{.*predict.*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Used:
    """At one moment. seconds: by kind: `engine`, `worker`, `standby`, and `service` for the process
    that was started. requests: for predictions, since the start."""

    seconds: Mapping[str, float]
    requests: float

    @classmethod
    def now(cls, url: str, process: int) -> "Used":
        """Of the service with this address and first process."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for member in family(process):
            seconds[_kind(member)] += _seconds(member)
        with urlopen(f"{url}/metrics", timeout=10) as response:
            counts = _ANSWERED.findall(response.read().decode())
        return cls(seconds, sum(map(float, counts)))

    def per_request(self, before: "Used") -> dict[str, float]:
        """Microseconds a request since then, by kind."""
        requests = self.requests - before.requests
        used = {kind: self.seconds[kind] - before.seconds.get(kind, 0.0) for kind in self.seconds}
        return {kind: 1e6 * spent / requests for kind, spent in used.items()} if requests else {}


def _kind(process: int) -> str:
    folder = Path(f"/proc/{process}")
    try:
        # An engine that was forked from the standby has its arguments.
        if folder.joinpath("comm").read_text().startswith("idspam-engine"):
            return "engine"
        found = _KIND.search(folder.joinpath("cmdline").read_text())
    except OSError:
        return "ended"
    return found.group(1) if found else "service"


def _seconds(process: int) -> float:
    try:
        stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(stat[11]) + int(stat[12])) / _TICKS
