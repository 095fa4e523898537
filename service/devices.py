"""The devices of a service: what `IDSPAM_DEVICE` may say, and which those are on this machine.

This is decided before anything imports torch, which takes seconds.
"""

import ctypes
import os
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Final

# Each has an engine process, to which each HTTP worker is connected.
MAX_DEVICES: Final = 16
ALL_GPUS: Final = "cuda:all"
_NUMBERED = re.compile(r"cuda:(0|[1-9][0-9]{0,2})")


def device_list(value: str) -> str:
    """The setting in its normal form: one device, or a list with commas.

    Raises:
        ValueError: it is neither.
    """
    names = [name.strip().lower() for name in value.split(",")]
    if len(names) == 1:
        (name,) = names
        if name not in ("auto", "cpu", "cuda", ALL_GPUS) and not _NUMBERED.fullmatch(name):
            raise ValueError(
                "must be auto, cpu, cuda, cuda:N, cuda:all, or a list such as cuda:0,cuda:1"
            )
        return name
    if len(names) > MAX_DEVICES:
        raise ValueError(f"at most {MAX_DEVICES} devices")
    if all(_NUMBERED.fullmatch(name) for name in names):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} is there twice: one engine keeps a GPU busy")
    elif any(name != "cpu" for name in names):
        raise ValueError("a list is of GPUs with their numbers, as cuda:0,cuda:1, or of cpu alone")
    return ",".join(names)


def devices_of(setting: str) -> tuple[str, ...]:
    """The devices, each for an engine of its own.

    Args:
        setting: as `device_list` returns it.

    Raises:
        ValueError: it asks for all GPUs, and there is none, or there are more than can be used.
    """
    if setting != ALL_GPUS:
        return tuple(setting.split(","))
    number = visible_gpus()
    if number == 0:
        raise ValueError("there is no GPU, or this build of torch cannot use one")
    if number > MAX_DEVICES:
        raise ValueError(f"{number} GPUs, and a service has at most {MAX_DEVICES} devices")
    return tuple(f"cuda:{index}" for index in range(number))


def own_device(device: str, engines: int) -> str:
    """The device by the name that this process uses from now on.

    Of several GPUs an engine's process sees its own one only, so that nothing in it can land on
    another one's memory. Call this before CUDA is used.

    Args:
        engines: how many the service has, each for a device.
    """
    index = device.removeprefix("cuda:")
    if engines == 1 or index == device or int(index) >= visible_gpus():
        return device
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen.split(",")[int(index)] if chosen else index
    return "cuda:0"


def visible_gpus() -> int:
    """How many NVIDIA GPUs torch will find, as far as can be told without importing it."""
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return 0
    count = ctypes.c_uint(0)
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
        if driver.nvmlInit_v2() != 0:
            return 0
        driver.nvmlDeviceGetCount_v2(ctypes.byref(count))
        driver.nvmlShutdown()
    except (OSError, AttributeError):
        return 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count.value if chosen is None else min(count.value, _chosen(chosen))


def _chosen(visible: str) -> int:
    """How many GPUs `CUDA_VISIBLE_DEVICES` names. CUDA ignores what follows a wrong one."""
    number = 0
    for name in visible.split(","):
        if name.strip() in ("", "-1"):
            break
        number += 1
    return number
