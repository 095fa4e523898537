"""The standby's process: it loads the backbone, and forks engine processes whenever it is asked.

A fork is safe only while this process has a single thread and has not touched CUDA. So torch
computes with one thread here, and for a GPU the weights stay on the CPU until the engine has them.
An engine shares the pages of the weights and of the imported code with this process.
"""

import importlib
import logging
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch

from adapters.backbone.loading import load_backbone, load_on_cpu, place, resolve_device
from adapters.backbone.model import Backbone
from adapters.errors import AdapterError
from service.ipc.child import BEAT_SECONDS, ChildContext, begin, begin_as, command_of
from service.ipc.engine_process import run_engine
from service.ipc.standby import MAX_MESSAGE_BYTES, Forked
from service.local import THREADS
from service.settings import Settings
from service.start import freeze_loaded_objects, start_error

logger = logging.getLogger(__name__)

# Threads that loaded the weights may still be ending.
_THREADS_END_SECONDS = 2.0
_ADOPTION_SECONDS = 5.0
# A process's name in `ps`; its arguments stay those of the standby.
_ENGINE_NAME = "idspam-engine"


def main() -> int:
    """The exit status: 0 once the supervisor is gone, 2 when the backbone cannot be loaded."""
    child, settings = begin()
    os.set_inheritable(child.requests, False)
    torch.set_num_threads(1)
    try:
        load = _prepared(settings)
    except Exception as error:
        child.failed(start_error(error))
        return 2
    forks = _can_fork()
    if not forks:
        logger.warning("the standby has threads or uses CUDA: engines start without its backbone")
    freeze_loaded_objects()
    child.ready("")
    with socket.socket(fileno=child.requests) as requests:
        return _serve(child, requests, load if forks else None)


def _prepared(settings: Settings) -> Callable[[str], Backbone]:
    """Load the backbone; returns what an engine calls with its device to get it there."""
    if _device_type(settings) == "cpu":
        backbone = load_backbone(settings.backbone, device="cpu", dtype=settings.dtype)
        return lambda _: backbone
    # Its kernels are imported here; where that fails, the engine says so and does without.
    try:
        importlib.import_module("service.engine.runners.slotted")
    except Exception:
        logger.debug("the kernels for slots cannot be imported", exc_info=True)
    source = load_on_cpu(settings.backbone)
    return lambda device: place(source, device=device, dtype=settings.dtype)


def _device_type(settings: Settings) -> str:
    """The type of the device that an engine would use; empty if it could not start."""
    if torch.version.cuda is None:
        return resolve_device(settings.device).type
    # In a process of its own: to count GPUs is to initialise CUDA, which no fork survives.
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        try:
            os.write(writing, resolve_device(settings.device).type.encode())
        except (AdapterError, RuntimeError):
            pass
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        device = answer.read()
    os.waitpid(process, 0)
    return device


def _can_fork() -> bool:
    until = time.monotonic() + _THREADS_END_SECONDS
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task")) == 1 and not torch.cuda.is_initialized()


def _serve(
    child: ChildContext, requests: socket.socket, load: Callable[[str], Backbone] | None
) -> int:
    """Fork an engine for each request, until the supervisor is gone. Returns in each engine, too,
    with its exit status."""
    while True:
        child.beat()
        if not select.select([requests], [], [], BEAT_SECONDS)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, MAX_MESSAGE_BYTES, 1)
        if not message:
            return 0
        (report,) = descriptors
        context = msgspec.json.decode(message, type=ChildContext)
        context = msgspec.structs.replace(context, report=report)
        reading, writing = os.pipe()
        try:
            parent = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            answer = Forked(0, f"cannot fork: {error.strerror}")
        else:
            if parent == 0:
                _fork_and_end(writing)
                requests.close()
                os.close(child.report)
                os.close(reading)
                return _engine(context, load)
            os.close(writing)
            with os.fdopen(reading) as numbers:
                number = numbers.read()
            os.waitpid(parent, 0)
            answer = Forked(int(number)) if number else Forked(0, "cannot fork")
        os.close(report)
        requests.send(msgspec.json.encode(answer))


def _fork_and_end(writing: int) -> None:
    """Fork once more, tell the standby which process that is, and end: the supervisor adopts it.
    Returns only in the new process."""
    try:
        process = os.fork()
        if process:
            os.write(writing, str(process).encode())
    except BaseException:
        os._exit(1)
    if process:
        os._exit(0)
    os.close(writing)


def _engine(context: ChildContext, load: Callable[[str], Backbone] | None) -> int:
    os.setpgrp()
    until = time.monotonic() + _ADOPTION_SECONDS
    while context.orphaned() and time.monotonic() < until:
        select.select([], [], [], 0.001)
    if load is None:
        os.set_inheritable(context.report, True)
        os.execv(sys.executable, command_of("engine", context))
    Path("/proc/self/comm").write_text(f"{_ENGINE_NAME}{context.number or ''}")
    torch.set_num_threads(THREADS)
    child, settings = begin_as(context)
    return run_engine(child, settings, partial(load, settings.device))
