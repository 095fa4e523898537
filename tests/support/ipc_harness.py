"""An engine's hub and workers' backends in one process, over real sockets, for tests."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import zmq
from prometheus_client import CollectorRegistry

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from adapters.format.store import AdapterStore
from service.catalog.entry import Condition
from service.engine.interface import Entry, cost_of
from service.engine.observer import FailureReason
from service.ipc.protocol import Codec, FromEngine
from service.ipc.remote import RemoteBackend
from service.ipc.server import Hub
from service.local import LocalBackend
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.tiny_models import make_adapter

MAX_BYTES = 8 * 2**20
ANY = Condition()
CODEC: Codec[FromEngine] = Codec(FromEngine)


@dataclass
class Failures:
    """Keeps what it is told."""

    rows: list[tuple[FailureReason, int]] = field(default_factory=list)

    def failed(self, reason: FailureReason, rows: int) -> None:
        self.rows.append((reason, rows))


@dataclass
class Wired:
    """The engine's side, started, and what connects to it."""

    context: "zmq.Context[zmq.Socket[bytes]]"
    endpoint: str
    store: Path
    local: LocalBackend
    hub: Hub
    failures: Failures = field(default_factory=Failures)
    workers: list[RemoteBackend] = field(default_factory=list)

    async def worker(self) -> RemoteBackend:
        """One more, welcomed."""
        made = RemoteBackend(
            self.context,
            self.endpoint,
            len(self.workers),
            store=self.store,
            observer=self.failures,
            max_bytes=MAX_BYTES,
        )
        self.workers.append(made)
        await made.start()
        return made

    def stranger(self) -> "zmq.Socket[bytes]":
        """A socket of the workers' kind that speaks for itself."""
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(self.endpoint)
        return socket


@asynccontextmanager
async def wired(
    backbone: Backbone, store: Path, *, load: Callable[[], Backbone] | None = None, **limits: Any
) -> AsyncIterator[Wired]:
    """A hub over a started engine; all ends with the block."""
    settings = Settings(device="cpu", zoo_dir=None, adapter_dir=store, cpu_lanes=1, **limits)
    metrics = Metrics(CollectorRegistry(), routes=[], error_types=[])
    local = LocalBackend(
        settings, AdapterStore(store), load=load or (lambda: backbone), observer=metrics
    )
    with tempfile.TemporaryDirectory(prefix="wired-") as folder, zmq.Context() as context:
        endpoint = f"ipc://{folder}/engine"
        hub = Hub(context, endpoint, local, max_bytes=MAX_BYTES)
        house = Wired(context, endpoint, store, local, hub)
        beating = asyncio.create_task(_beat(hub))
        try:
            await local.start()
            local.catalog.follower = hub
            hub.open()
            yield house
        finally:
            for worker in house.workers:
                await worker.stop()
            beating.cancel()
            hub.close()
            await local.stop()


async def _beat(hub: Hub) -> None:
    while True:
        hub.beat()
        await asyncio.sleep(0.1)


def entry(worker: RemoteBackend, name: str, text: str, *, explain: bool = False) -> Entry:
    """As the route makes it: from the replica and the worker's own tokenizer."""
    key, spec = worker.catalog.resolve(name)
    encoding = worker.engine.info.encoder.encode(text, max_length=spec.max_length)
    return Entry(key, encoding, cost_of(encoding, spec), explain)


def data(backbone: Backbone, seed: int) -> bytes:
    return serialize(make_adapter(backbone, seed=seed))


async def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.01)


async def heard(socket: "zmq.Socket[bytes]", kind: type) -> bool:
    """Whether a message of this kind comes, soon."""
    deadline = monotonic() + 10
    while monotonic() < deadline:
        while socket.poll(0):
            if any(isinstance(item, kind) for item in CODEC.decode(socket.recv())):
                return True
        await asyncio.sleep(0.01)
    return False
