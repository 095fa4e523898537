"""Memory of processes and of the device, and whether it grows. Linux: reads /proc."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

_PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2.0**20


@dataclass(frozen=True, slots=True)
class Sample:
    """MiB. progress: of whatever the samples are taken over."""

    progress: float
    host: float
    device: float


@dataclass(slots=True)
class Samples:
    """What was seen, in order."""

    taken: list[Sample] = field(default_factory=list)

    def growth(self, first: float) -> dict[str, float]:
        """MiB on the host and the device: at `first` and in the end, and what a line through all
        samples from `first` on gains over a hundred steps of progress."""
        chosen = [sample for sample in self.taken if sample.progress >= first]
        if len(chosen) < 2:
            return {}
        progress = [sample.progress for sample in chosen]
        host = [sample.host for sample in chosen]
        device = [sample.device for sample in chosen]
        return {
            "host_mib_first": host[0],
            "host_mib_last": host[-1],
            "host_mib_per_100": _slope(progress, host) * 100,
            "device_mib_first": device[0],
            "device_mib_last": device[-1],
            "device_mib_per_100": _slope(progress, device) * 100,
        }


def resident_mib(root: int) -> float:
    """Resident memory of a process and all that it started; shared pages count in each."""
    return sum(_resident(process) for process in family(root)) / MIB


def device_mib() -> float:
    """What is taken on the GPU, by whomever; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


def family(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for item in Path("/proc").iterdir():
        if item.name.isdigit() and (parent := _parent(item)) is not None:
            children.setdefault(parent, []).append(int(item.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


class Progress:
    """A count that one thread moves on and another reads."""

    def __init__(self) -> None:
        self.value = 0


@contextmanager
def sampled(root: int, progress: Progress, *, every: float) -> Iterator[Samples]:
    """Sample a process's family, and the device, every so many seconds until the block ends."""
    samples, over = Samples(), threading.Event()

    def watch() -> None:
        while not over.wait(every):
            samples.taken.append(Sample(progress.value, resident_mib(root), device_mib()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _slope(progress: Sequence[float], values: Sequence[float]) -> float:
    if progress[0] == progress[-1]:
        return 0.0
    return float(np.polyfit(progress, values, 1)[0])


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):  # it has just ended
        return 0


def _parent(folder: Path) -> int | None:
    try:
        # Behind the name, which is in brackets and may hold anything: state, parent.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None
