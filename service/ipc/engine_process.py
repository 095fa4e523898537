"""An engine's process: it owns a device, and answers the workers' requests. The first one of a
service owns the catalog, too; those of further devices follow it (`service.ipc.further_engine`).

It ends itself when the device hangs or its event loop is stuck; the supervisor starts another.
"""

import asyncio
import faulthandler
import logging
import os
import signal
from collections.abc import Callable

import torch
import uvloop
import zmq

from adapters.backbone.model import Backbone
from service.ipc.channel import Context
from service.ipc.child import ChildContext, begin
from service.ipc.further_engine import FurtherBackend
from service.ipc.further_engines import FurtherEngines
from service.ipc.metrics_forwarding import MetricsForwarder
from service.ipc.server import EngineServer
from service.local import THREADS, LocalBackend, backbone_loader, local_backend
from service.settings import Settings
from service.start import StartFailed, freeze_loaded_objects, start_error

logger = logging.getLogger(__name__)

_LINGER_MILLISECONDS = 500


class EngineProcess:
    """The life of the backend, from start to drain; created on the event loop."""

    def __init__(
        self,
        child: ChildContext,
        settings: Settings,
        backend: LocalBackend | FurtherBackend,
        context: Context,
    ) -> None:
        self._child = child
        self._settings = settings
        self._backend = backend
        self._started = False
        self._others = FurtherEngines()
        if isinstance(backend, LocalBackend):
            self._others = FurtherEngines(backend.trials, backend.monitor)
        self._server = EngineServer(
            context,
            child.engine_endpoints[child.number],
            backend,
            max_bytes=settings.max_message_bytes,
            others=self._others,
        )

    async def run(self) -> None:
        """
        Raises:
            Exception: the backend cannot be started.
        """
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        watching = asyncio.create_task(self._child.watch(self._beat))
        starting = asyncio.create_task(self._start())
        stopped = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                await stopped
                await self._drain()
        finally:
            for task in (watching, starting, stopped):
                task.cancel()
            await self._backend.stop()
            self._server.close()

    async def _start(self) -> None:
        await self._backend.start()
        if isinstance(self._backend, LocalBackend):
            self._backend.connect(
                update=self._server.update,
                everywhere=self._server.updated_everywhere,
                renewed=self._server.renewed,
                others=self._others,
            )
        self._server.open()
        freeze_loaded_objects()
        self._started = True
        self._child.ready("")

    async def _drain(self) -> None:
        # The workers drained before, unless one was killed: its requests may still run.
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._backend.engine.drain()
        except TimeoutError:
            logger.warning("not drained in time")

    def _beat(self) -> None:
        health = self._backend.health()
        if self._started and not health.live:
            logger.critical("this process ends: %s", health.reason)
            self._child.failed(health.reason or "the engine is not live")
            faulthandler.dump_traceback()
            os._exit(1)
        self._server.beat()


async def _run(
    child: ChildContext,
    settings: Settings,
    context: Context,
    load: Callable[[], Backbone] | None,
) -> str | None:
    """Run to the end; returns why it could not start, or None."""
    metrics = MetricsForwarder(context, child.supervisor_endpoint)
    metrics.open()
    try:
        backend: LocalBackend | FurtherBackend
        if child.number == 0:
            name = child.device if child.engines > 1 else ""
            backend = local_backend(
                settings,
                metrics,
                load=load,
                engines=child.engines,
                device_name=name,
                alone=True,
            )
        else:
            load = load or backbone_loader(settings)
            backend = FurtherBackend(child, settings, metrics, context, load=load)
        await EngineProcess(child, settings, backend, context).run()
    except StartFailed as error:
        return str(error)
    except Exception as error:
        return start_error(error)
    finally:
        metrics.close(_LINGER_MILLISECONDS)
    return None


def main() -> int:
    """The exit status: 0 after SIGTERM, 2 when it cannot start."""
    return run_engine(*begin())


def run_engine(
    child: ChildContext, settings: Settings, load: Callable[[], Backbone] | None = None
) -> int:
    """The same; load: as of `service.local.local_backend`."""
    if child.engines > 1:
        # Engines on the CPU share its cores.
        torch.set_num_threads(max(1, THREADS // child.engines))
    context: Context = zmq.Context()
    failure = uvloop.run(_run(child, settings, context, load))
    context.destroy(linger=_LINGER_MILLISECONDS)
    child.tidy()
    if failure is not None:
        child.failed(failure)
        return 2
    return 0
