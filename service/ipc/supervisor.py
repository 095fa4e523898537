"""The parent of an engine for each device, their standby and N HTTP workers.

It starts, replaces and ends them, reserves the address on which the workers listen, and keeps the
metrics of all processes.
"""

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import msgspec
import uvloop
import zmq
from prometheus_client import CollectorRegistry

from service.access.exposure import log_access
from service.http.app import route_paths
from service.http.errors import error_types
from service.http.server import bound_host, reserve, url_of
from service.ipc.channel import Context
from service.ipc.child import (
    Callbacks,
    Child,
    ChildContext,
    Kind,
    NeverReady,
    Usage,
    launch_module,
    usage_of,
)
from service.ipc.metrics_forwarding import MetricsReceiver
from service.ipc.standby import Standby, adopt_orphans
from service.observability.logs import configure_logging
from service.observability.metrics import Metrics
from service.settings import Settings
from service.start import StartFailed, log_service_links

logger = logging.getLogger(__name__)

# For a worker to close after it has drained, and for the engine to end after its workers.
_CLOSING_SECONDS = 5.0
_ENGINE_SECONDS = 10.0


def supervise(settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT has drained all workers.

    Raises:
        StartFailed: a process ended before it was ready for the first time.
    """
    configure_logging(settings.log_level, settings.log_format, process="supervisor")
    log_access(settings)
    log_service_links(os.environ)
    try:
        reserved = reserve(listener)
    except OSError as error:
        raise StartFailed(f"cannot share the port: {error.strerror or error}") from None
    with reserved, _private_folder() as folder, zmq.Context() as context:
        try:
            uvloop.run(Supervisor(settings, reserved, folder, context).run())
        except NeverReady as error:
            raise StartFailed(str(error)) from None


class Supervisor:
    """Created before its event loop.

    Args:
        reserved: bound to the address on which the workers listen.
        folder: for sockets; private to this user, and empty.
    """

    def __init__(
        self,
        settings: Settings,
        reserved: socket.socket,
        folder: Path,
        context: Context,
    ) -> None:
        self._settings = settings
        self._context = context
        self._metrics = Metrics(
            CollectorRegistry(), routes=route_paths(), error_types=error_types()
        )
        # Every child that was ever started, with its last process.
        self._metrics.devices(len(settings.devices))
        self._used: dict[Child, tuple[int, Usage]] = {}
        self._own = (os.getpid(), Usage(0, 0.0))
        self._running: set[Child] = set()
        self._announced = False
        self._line = ""
        self._stopping = asyncio.Event()
        callbacks = Callbacks(self._begun, self._ready, self._ended)
        url = url_of(reserved, settings.scheme)
        engine = ChildContext(
            "engine",
            str(folder),
            os.getpid(),
            report=-1,
            url=url,
            engines=len(settings.devices),
        )
        self._endpoint = engine.supervisor_endpoint
        self._standby: Standby | None = None
        if settings.standby and adopt_orphans():
            # It loads for any engine, and so sees all devices.
            context_of_standby = msgspec.structs.replace(
                engine, name="standby", device=settings.devices[0], engines=1
            )
            self._standby = Standby(context_of_standby, callbacks)
        launch = self._standby.fork if self._standby is not None else None
        self._engines = [
            Child(
                "engine",
                msgspec.structs.replace(
                    engine,
                    name=f"engine-{number}" if number else "engine",
                    number=number,
                    device=device,
                ),
                callbacks,
                launch,
            )
            for number, device in enumerate(settings.devices)
        ]
        host, port = bound_host(reserved), reserved.getsockname()[1]
        threads = tokenizer_threads(settings.workers or 1)
        self._workers = [
            Child(
                "worker",
                msgspec.structs.replace(
                    engine, name=f"worker-{number}", number=number, host=host, port=port
                ),
                callbacks,
                partial(launch_module, "worker", environment=threads),
            )
            for number in range(settings.workers or 0)
        ]
        standby = [self._standby.child] if self._standby is not None else []
        self._children = [*standby, *self._engines, *self._workers]

    async def run(self) -> None:
        """
        Raises:
            NeverReady: a process ended before it was ready for the first time; so do all others.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        self._receiver = MetricsReceiver(
            self._context, self._endpoint, self._metrics, refresh=self._measure
        )
        for kind in get_args(Kind):
            # The series exists before the first restart.
            self._metrics.restarted(kind, 0)
        self._show_alive()
        keeping = {child: asyncio.create_task(child.keep()) for child in self._children}
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            # Until a signal comes, a child's task ends only by an error.
            done, _ = await asyncio.wait(
                [*keeping.values(), stopping], return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            stopping.cancel()
            await self._end(keeping)
            # Others may have failed meanwhile; asyncio logs errors that nobody asks for.
            await asyncio.gather(*keeping.values(), return_exceptions=True)
        for task in done - {stopping}:
            await task

    async def _end(self, keeping: "Mapping[Child, asyncio.Task[None]]") -> None:
        """End workers first: while they drain, their requests need the engine."""
        workers = [keeping[worker] for worker in self._workers]
        for worker in self._workers:
            worker.stop()
        await asyncio.wait(workers, timeout=self._settings.drain_seconds + _CLOSING_SECONDS)
        for worker in self._workers:
            worker.kill()
        await asyncio.wait(workers)
        for engine in self._engines:
            engine.stop()
        if self._standby is not None:
            self._standby.stop()
        await asyncio.wait(keeping.values(), timeout=_ENGINE_SECONDS)
        self._kill_all()
        await asyncio.wait(keeping.values())
        self._receiver.close()

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()
        if self._standby is not None:
            self._standby.kill()

    def _signalled(self) -> None:
        """The first signal drains, the second one ends everything at once."""
        if self._stopping.is_set():
            self._kill_all()
        self._stopping.set()

    def _begun(self, child: Child, process: int) -> None:
        if child in self._used:
            self._metrics.restarted(child.kind)
        self._used[child] = (process, Usage(0, 0.0))
        self._running.add(child)
        if child in self._engines:
            self._receiver.set_engine(process, child.name)
        self._show_alive()

    def _ready(self, child: Child, line: str) -> None:
        logger.info("%s is ready", child.name)
        if self._standby is not None and child is self._standby.child:
            self._standby.ready()
        if not self._announced and all(child.was_ready for child in self._children):
            self._announced = True
            sys.stdout.write(f"{self._line or line}\n")
            sys.stdout.flush()
        self._line = self._line or line

    def _ended(self, child: Child) -> None:
        self._running.discard(child)
        self._metrics.process_used(child.name, resident_bytes=0, cpu_seconds=0.0)
        if child in self._engines:
            self._receiver.set_engine(None, child.name)
        elif self._standby is not None and child is self._standby.child:
            self._standby.ended()
        else:
            self._metrics.connections(child.name, opened=0, held_bytes=0, stored_bytes=0)
        self._show_alive()

    def _show_alive(self) -> None:
        kinds = [child.kind for child in self._running]
        self._metrics.processes("supervisor", 1)
        for kind in get_args(Kind):
            self._metrics.processes(kind, kinds.count(kind))

    def _measure(self) -> None:
        for child in self._running:
            self._used[child] = self._measured(child.name, *self._used[child])
        self._own = self._measured("supervisor", *self._own)

    def _measured(self, name: str, process: int, before: Usage) -> tuple[int, Usage]:
        used = usage_of(process) or before
        self._metrics.process_used(
            name,
            resident_bytes=used.resident_bytes,
            cpu_seconds=used.cpu_seconds - before.cpu_seconds,
        )
        return process, used


def tokenizer_threads(workers: int) -> dict[str, str]:
    """The environment that gives each worker its share of the cores to tokenise with.

    By itself the tokenizer has a thread a core, in every worker: with twelve of them on 16 cores,
    192 threads took a third more processor time for the same texts. What is set already stays.
    """
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    threads = max(1, cores // workers)
    wanted = {
        "RAYON_NUM_THREADS": str(threads),
        # Then the texts do not even go to another thread.
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def _private_folder() -> Iterator[Path]:
    """
    Raises:
        StartFailed: sockets cannot be created there.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="idspam-"))
    except OSError as error:
        raise StartFailed(f"no folder for sockets: {error}") from None
    try:
        if len(os.fsencode(folder / "supervisor")) > zmq.IPC_PATH_MAX_LEN:
            raise StartFailed(f"TMPDIR: {folder.parent} is too long for the path of a socket")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
