"""How many HTTP processes `IDSPAM_WORKERS=auto` starts.

Beside a GPU one process would parse requests, feed the device and write answers; on 16 cores twelve
workers bring half as much again. Each GPU may have as many. On a CPU the model takes the cores, so
there is a single process.
This is decided before anything imports torch, which takes seconds, and memory that the supervisor
does not need.
"""

import os
from typing import Final

from service.devices import devices_of, visible_gpus

# The engines take a core each, their devices' drivers and clients the rest.
_SHARE: Final = 3 / 4
_MOST: Final = 12
# With fewer cores the engine would wait for its own workers.
_LEAST_CORES: Final = 4


def workers_of(setting: int | None, device: str) -> int:
    """The number of HTTP processes beside the engine's; 0: a single process.

    Args:
        setting: `Settings.workers`; None is decided here.
        device: `IDSPAM_DEVICE`, in its normal form.

    Raises:
        ValueError: as `service.devices.devices_of`.
    """
    if setting is not None:
        return setting
    devices = devices_of(device)
    if not (device.startswith("cuda") or (device == "auto" and _has_gpu())):
        # A list needs workers, for it is they who choose a device.
        return len(devices) if len(devices) > 1 else 0
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if cores < _LEAST_CORES and len(devices) == 1:
        return 0
    return max(1, min(_MOST * len(devices), int(_SHARE * cores)))


def _has_gpu() -> bool:
    """Whether torch will find an NVIDIA GPU, as far as can be told without importing it."""
    return visible_gpus() > 0
