"""Memory of processes and of the device, and whether it grows. Reads /proc (Linux)."""

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
    """MiB at one moment. progress: how far the measured work was."""

    progress: float
    host: float
    device: float


@dataclass(slots=True)
class Samples:
    """All samples, in order."""

    taken: list[Sample] = field(default_factory=list)

    def growth(self, first: float) -> dict[str, float]:
        """MiB of host and device from progress `first` on: first, last, and the slope of a line
        through all samples, for a hundred steps of progress."""
        samples = [sample for sample in self.taken if sample.progress >= first]
        if len(samples) < 2:
            return {}
        progress = [sample.progress for sample in samples]
        growth = {}
        for place in ("host", "device"):
            mib = [getattr(sample, place) for sample in samples]
            growth[f"{place}_mib_first"] = mib[0]
            growth[f"{place}_mib_last"] = mib[-1]
            growth[f"{place}_mib_per_100"] = _slope(progress, mib) * 100
        return growth


def resident_mib(root: int) -> float:
    """Resident memory of a process and its descendants; shared pages count in each."""
    return sum(_resident(process) for process in family(root)) / MIB


def device_mib() -> float:
    """Memory in use on the GPU, by any process; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


def family(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (parent := _parent(folder)) is not None:
            children.setdefault(parent, []).append(int(folder.name))
    processes = [root]
    for process in processes:
        processes += children.get(process, [])
    return processes


class Progress:
    """A count that one thread advances and another reads."""

    def __init__(self) -> None:
        self.value = 0


@contextmanager
def sampled(root: int, progress: Progress, *, every: float) -> Iterator[Samples]:
    """Sample a process's family and the device every so many seconds, until the block ends."""
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
        # After the name, which is in brackets and may hold anything: state, parent.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None
