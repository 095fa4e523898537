"""An engine server and workers' remote backends in one process, over real sockets."""

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
from service.engine.observer import FailureReason, Observer
from service.ipc.protocol import Codec, FromEngine
from service.ipc.remote import RemoteBackend
from service.ipc.server import EngineServer
from service.local import LocalBackend
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.tiny_models import make_adapter

MAX_BYTES = 8 * 2**20
ANY = Condition()
CODEC: Codec[FromEngine] = Codec(FromEngine)


class Failures(Observer):
    """Records failed rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[FailureReason, int]] = []

    def failed(self, reason: FailureReason, rows: int) -> None:
        self.rows.append((reason, rows))


@dataclass
class EngineWithWorkers:
    """A started engine with its server, and the workers connected to it."""

    context: "zmq.Context[zmq.Socket[bytes]]"
    endpoint: str
    store: Path
    local: LocalBackend
    server: EngineServer
    failures: Failures = field(default_factory=Failures)
    workers: list[RemoteBackend] = field(default_factory=list)

    async def worker(self) -> RemoteBackend:
        """Start another worker; returns when it is welcomed."""
        worker = RemoteBackend(
            self.context,
            self.endpoint,
            len(self.workers),
            store=self.store,
            observer=self.failures,
            max_bytes=MAX_BYTES,
        )
        self.workers.append(worker)
        await worker.start()
        return worker

    def raw_worker(self) -> "zmq.Socket[bytes]":
        """A worker's socket, on which the test sends and receives frames itself."""
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(self.endpoint)
        return socket


@asynccontextmanager
async def engine_with_workers(
    backbone: Backbone, store: Path, *, load: Callable[[], Backbone] | None = None, **limits: Any
) -> AsyncIterator[EngineWithWorkers]:
    """An engine that workers can connect to; everything ends with the block."""
    settings = Settings(device="cpu", zoo_dir=None, adapter_dir=store, cpu_lanes=1, **limits)
    metrics = Metrics(CollectorRegistry(), routes=[], error_types=[])
    local = LocalBackend(
        settings, AdapterStore(store), load=load or (lambda: backbone), observer=metrics
    )
    with (
        tempfile.TemporaryDirectory(prefix="engine-") as folder,
        zmq.Context() as context,
    ):
        endpoint = f"ipc://{folder}/engine"
        server = EngineServer(context, endpoint, local, max_bytes=MAX_BYTES)
        engine = EngineWithWorkers(context, endpoint, store, local, server)
        beating = asyncio.create_task(_beat(server))
        try:
            await local.start()
            local.catalog.on_update = server.update
            server.open()
            yield engine
        finally:
            for worker in engine.workers:
                await worker.stop()
            beating.cancel()
            server.close()
            await local.stop()


async def _beat(server: EngineServer) -> None:
    while True:
        server.beat()
        await asyncio.sleep(0.1)


def entry(worker: RemoteBackend, name: str, text: str, *, explain: bool = False) -> Entry:
    """An entry as a route creates it: from the worker's copy of the catalog and its tokenizer."""
    key, spec, _ = worker.catalog.resolve(name)
    encoding = worker.engine.info.encoder.encode(text, max_length=spec.max_length)
    return Entry(key, encoding, cost_of(encoding, spec), explain)


def data(backbone: Backbone, seed: int) -> bytes:
    return serialize(make_adapter(backbone, seed=seed))


async def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.01)


async def receives(socket: "zmq.Socket[bytes]", kind: type) -> bool:
    """Whether a message of this kind arrives within ten seconds."""
    deadline = monotonic() + 10
    while monotonic() < deadline:
        while socket.poll(0):
            if any(isinstance(item, kind) for item in CODEC.decode(socket.recv())):
                return True
        await asyncio.sleep(0.01)
    return False
