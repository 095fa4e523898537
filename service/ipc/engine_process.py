"""The engine's process: the device, the catalog that counts, and the workers' requests for both.

A process whose device hangs, or whose event loop stands still, ends itself: the supervisor starts
another, which is the only remedy.
"""

import asyncio
import faulthandler
import logging
import os
import signal
import sys

import uvloop
import zmq

from service.ipc.child import Part, begin
from service.ipc.metrics_forwarding import Relay
from service.ipc.server import Hub
from service.local import LocalBackend, local_backend
from service.settings import Settings
from service.start import StartFailed, settle, why

logger = logging.getLogger("service.ipc.engine_process")

_LINGER_MILLISECONDS = 500


class EngineProcess:
    """From the start of the backend to its end; made on the event loop."""

    def __init__(
        self,
        part: Part,
        settings: Settings,
        backend: LocalBackend,
        context: "zmq.Context[zmq.Socket[bytes]]",
    ) -> None:
        self._part = part
        self._settings = settings
        self._backend = backend
        self._started = False
        self._hub = Hub(
            context, part.engine_endpoint, backend, max_bytes=settings.max_message_bytes
        )

    async def run(self) -> None:
        """
        Raises:
            Exception: the backend cannot be started.
        """
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        watching = asyncio.create_task(self._part.watch(self._beat))
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
            self._hub.close()

    async def _start(self) -> None:
        await self._backend.start()
        self._backend.catalog.follower = self._hub
        self._hub.open()
        settle()
        self._started = True
        self._part.ready("")

    async def _drain(self) -> None:
        # The workers have drained before; this is for those that could not.
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._backend.engine.drain()
        except TimeoutError:
            logger.warning("not drained in time")

    def _beat(self) -> None:
        health = self._backend.health()
        if self._started and not health.live:
            logger.critical("this process ends: %s", health.reason)
            self._part.failed(health.reason or "the engine is not live")
            faulthandler.dump_traceback()
            os._exit(1)
        self._hub.beat()


async def _run(
    part: Part, settings: Settings, context: "zmq.Context[zmq.Socket[bytes]]"
) -> str | None:
    """Why it could not start, if so."""
    relay = Relay(context, part.supervisor_endpoint)
    relay.open()
    try:
        backend = local_backend(settings, relay)
        await EngineProcess(part, settings, backend, context).run()
    except StartFailed as error:
        return str(error)
    except Exception as error:
        return why(error)
    finally:
        relay.close(_LINGER_MILLISECONDS)
    return None


def main() -> int:
    """The exit status: 0 after SIGTERM, 2 when it cannot start."""
    part, settings = begin()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    failure = uvloop.run(_run(part, settings, context))
    context.destroy(linger=_LINGER_MILLISECONDS)
    part.tidy()
    if failure is not None:
        part.failed(failure)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
