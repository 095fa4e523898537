"""A worker's process: HTTP, authorisation, tokenisation, serialisation.

It runs the same app as a service of one process, over a remote engine and with forwarded metrics.
It never imports torch, which an import rule and a test check.
"""

import asyncio
from pathlib import Path

import zmq

from service.access.key_file import BadKeys
from service.access.quotas import Quotas
from service.access.tls import BadCertificate
from service.http.app import create_app
from service.http.server import Server, address_text, listen_shared, survive_late_signals
from service.ipc.channel import Context
from service.ipc.child import ChildContext, begin
from service.ipc.least_connections import LeastConnections
from service.ipc.metrics_forwarding import MetricsForwarder
from service.ipc.several_engines import SeveralEngines
from service.settings import Settings
from service.start import StartFailed

_LINGER_MILLISECONDS = 500


class WorkerBackend(SeveralEngines):
    """A remote backend, and whatever else starts and stops with a worker's event loop."""

    def __init__(
        self,
        child: ChildContext,
        settings: Settings,
        metrics: MetricsForwarder,
        context: Context,
    ) -> None:
        super().__init__(
            context,
            child.engine_endpoints,
            child.number,
            store=settings.adapter_dir,
            observer=metrics,
            max_bytes=settings.max_message_bytes,
        )
        self._child = child
        self._metrics = metrics
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._metrics.open()
        self._watching = asyncio.create_task(self._child.watch(self.check))
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        # Called again after the last connection is closed, when the last requests are counted.
        self._metrics.flush()


def main() -> int:
    """The exit status: 0 after a drain."""
    child, settings = begin()
    try:
        listener = listen_shared(child.host, child.port)
    except OSError as error:
        child.failed(
            f"cannot listen on {address_text(child.host, child.port)}: {error.strerror or error}"
        )
        return 2
    context: Context = zmq.Context()
    metrics = MetricsForwarder(context, child.supervisor_endpoint)
    try:
        backend = WorkerBackend(child, settings, metrics, context)
        quotas = Quotas(Path(child.folder) / "quotas")
        app = create_app(settings, backend, metrics, quotas)
        service = app.state.service
        neighbours = LeastConnections(Path(child.folder), child.number, settings.workers or 1)
        server = Server(
            app,
            service,
            url=child.url,
            announce=child.ready,
            process=child.name,
            neighbours=neighbours,
        )
    except (BadKeys, BadCertificate, OSError, StartFailed) as error:
        # A file of keys, of the certificate or of those that workers share has become unusable
        # since the service was started, or there are too few descriptors.
        child.failed(str(error))
        return 2
    survive_late_signals()
    server.run(sockets=[listener])
    context.destroy(linger=_LINGER_MILLISECONDS)
    child.tidy()
    if server.failure is not None:
        child.failed(server.failure)
        return 2
    return 0
