"""How many HTTP processes `IDSPAM_WORKERS=auto` starts.

Beside a GPU one process would parse requests, feed the device and write answers; on 16 cores twelve
workers bring half as much again. On a CPU the model takes the cores, so there is a single process.
This is decided before anything imports torch, which takes seconds, and memory that the supervisor
does not need.
"""

import ctypes
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Final

# The engine takes one core, its device's driver and clients the rest.
_SHARE: Final = 3 / 4
_MOST: Final = 12
# With fewer cores the engine would wait for its own workers.
_LEAST_CORES: Final = 4


def workers_of(setting: int | None, device: str) -> int:
    """The number of HTTP processes beside the engine's; 0: a single process.

    Args:
        setting: `Settings.workers`; None is decided here.
        device: `IDSPAM_DEVICE`.
    """
    if setting is not None:
        return setting
    if not (device.startswith("cuda") or (device == "auto" and _has_gpu())):
        return 0
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return 0 if cores < _LEAST_CORES else min(_MOST, int(_SHARE * cores))


def _has_gpu() -> bool:
    """Whether torch will find an NVIDIA GPU, as far as can be told without importing it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return False
    count = ctypes.c_uint(0)
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
        if driver.nvmlInit_v2() != 0:
            return False
        driver.nvmlDeviceGetCount_v2(ctypes.byref(count))
        driver.nvmlShutdown()
    except (OSError, AttributeError):
        return False
    return count.value > 0
