"""A worker's process: HTTP, authorisation, tokenisation, serialisation. Imports no torch.

The same app as in a service of one process, over a remote engine; what it measures is relayed.
"""

import asyncio
import sys

import zmq

from service.http.app import create_app
from service.http.server import Server, ignore_repeated_signals, listen_beside
from service.ipc.child import Part, begin
from service.ipc.metrics_forwarding import Relay
from service.ipc.remote import RemoteBackend
from service.settings import Settings

_LINGER_MILLISECONDS = 500


class WorkerBackend(RemoteBackend):
    """A remote backend, and what else begins and ends with a worker's event loop."""

    def __init__(
        self,
        part: Part,
        settings: Settings,
        relay: Relay,
        context: "zmq.Context[zmq.Socket[bytes]]",
    ) -> None:
        super().__init__(
            context,
            part.engine_endpoint,
            part.number,
            store=settings.adapter_dir,
            observer=relay,
            max_bytes=settings.max_message_bytes,
        )
        self._part = part
        self._relay = relay
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._relay.open()
        self._watching = asyncio.create_task(self._part.watch(self.check))
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        # Stopped a second time when the last connection is closed: what was counted until then.
        self._relay.flush()


def main() -> int:
    """The exit status: 0 after a drain."""
    part, settings = begin()
    try:
        listener = listen_beside(part.host, part.port)
    except OSError as error:
        part.failed(f"cannot listen on {part.host}:{part.port}: {error.strerror or error}")
        return 2
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    relay = Relay(context, part.supervisor_endpoint)
    app = create_app(settings, WorkerBackend(part, settings, relay, context), relay)
    server = Server(app, app.state.service, url=part.url, announce=part.ready)
    ignore_repeated_signals()
    server.run(sockets=[listener])
    context.destroy(linger=_LINGER_MILLISECONDS)
    part.tidy()
    if server.failure is not None:
        part.failed(server.failure)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
