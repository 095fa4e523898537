"""A worker's backend where several devices have an engine each."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from service.engine.interface import EngineHealth
from service.engine.observer import Observer
from service.ipc.channel import Context
from service.ipc.least_loaded import LeastLoaded
from service.ipc.protocol import (
    Adapters,
    EngineLoad,
    FromEngine,
    Heartbeat,
    PredictDone,
    RequestFailed,
    load_of,
)
from service.ipc.remote import Connection, RemoteBackend, RemoteEngine, Requests

logger = logging.getLogger(__name__)


class FurtherLink:
    """A worker's connection to the engine of a further device.

    Args:
        number: of that engine.
    """

    def __init__(
        self,
        context: Context,
        endpoint: str,
        worker: int,
        number: int,
        *,
        observer: Observer,
        max_bytes: int,
    ) -> None:
        self._number = number
        self._connection = Connection(
            context, endpoint, worker, receive=self._receive, lost=self._lost, max_bytes=max_bytes
        )
        self._requests = Requests(self._connection, observer, counts_lost=False)
        self.engine = RemoteEngine(self._requests)
        self._ready = False

    def is_usable(self) -> bool:
        """Whether the engine has welcomed this worker, and has lately said that it is ready."""
        return self._ready and self._requests.unavailable is None and self._connection.fresh

    def open(self) -> None:
        self._connection.open()

    def close(self) -> None:
        self._connection.close()
        self._leave("the service is stopped")

    def check(self) -> None:
        """As of `service.ipc.remote.RemoteBackend`."""
        self._connection.check()
        self._requests.expire()

    def _receive(self, message: FromEngine) -> None:
        match message:
            case PredictDone():
                self._requests.answer(message)
            case RequestFailed():
                self._requests.fail(message)
            case Heartbeat():
                self._ready = message.ready
            case EngineLoad():
                self.engine.set_load(load_of(message), message.workers)
            case Adapters(last=True):
                # The tokenizer, the adapters and all else are those of the first engine.
                self._requests.unavailable = None
                logger.info("welcomed by engine %d", self._number)

    def _lost(self, reason: str) -> None:
        logger.warning("connection to engine %d lost: %s", self._number, reason)
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        self._ready = False
        self.engine.set_load(None)
        self._requests.fail_all(reason)


class SeveralEngines(RemoteBackend):
    """As `RemoteBackend`, whose engine has the catalog; predictions go to all engines.

    The lease is that of the first engine alone: it decides which revisions this worker may name.

    Args:
        endpoints: of all engines, that with the catalog first.
    """

    def __init__(
        self,
        context: Context,
        endpoints: Sequence[str],
        worker: int,
        *,
        store: Path,
        observer: Observer,
        max_bytes: int,
    ) -> None:
        first, *further = endpoints
        super().__init__(
            context,
            first,
            worker,
            store=store,
            observer=observer,
            max_bytes=max_bytes,
            counts_lost=not further,
        )
        self._links = [
            FurtherLink(context, endpoint, worker, number, observer=observer, max_bytes=max_bytes)
            for number, endpoint in enumerate(further, start=1)
        ]
        self._all: LeastLoaded | None = None
        if further:
            engines = [(self._engine, self.is_connected)]
            engines += [(link.engine, link.is_usable) for link in self._links]
            self.engine = self._all = LeastLoaded(engines, observer)

    async def start(self) -> None:
        for link in self._links:
            link.open()
        await super().start()

    async def stop(self) -> None:
        for link in self._links:
            link.close()
        await super().stop()

    def check(self) -> None:
        super().check()
        for link in self._links:
            link.check()

    def health(self) -> EngineHealth:
        health = super().health()
        if self._all is None:
            return health
        devices = {"devices": 1 + len(self._links), "devices_missing": self._all.missing}
        return replace(health, details={**health.details, **devices})
