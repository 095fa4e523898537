"""The most memory that a piece of work held, and giving memory back. Knows no model."""

import ctypes
import resource
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Count from now on; where the system cannot forget a process's peak, it counts from its
    start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """Bytes: what tensors took on a GPU; on a CPU, what was resident of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = next(line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


def give_back() -> None:
    """Return what was freed on the host to the system, where the C library can.

    Batches without padding differ in size, and glibc keeps the gaps between tensors: a run would
    grow by some megabytes a step.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
