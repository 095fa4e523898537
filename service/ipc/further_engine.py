"""The engine of a further device, in a process of its own.

It has no catalog. It follows that of the first engine, to which it connects like a worker: it loads
what is served, gives back what no longer is, and passes on what it sees of trials and of drift.
Workers send it predictions alone, which name revisions.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from adapters import __version__
from adapters.backbone.model import Backbone
from adapters.errors import AdapterError
from adapters.format.store import AdapterStore
from adapters.format.uploads import ReceivedFile
from service.catalog.entry import CatalogEntry, Change, ChangeResult, Inspection
from service.catalog.preloading import PRELOADING_SECONDS, preload_all
from service.catalog.view import CatalogView
from service.drift.further import FurtherMonitor
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, EngineHealth, EngineInfo
from service.engine.observer import Observer
from service.engine.trials import DropReason, Pair, Role, TrialListener
from service.errors import EngineUnavailable, ServiceError
from service.ipc.channel import Context
from service.ipc.child import ChildContext
from service.ipc.protocol import (
    Adapters,
    Applied,
    AskUsed,
    CatalogUpdate,
    Counted,
    Forget,
    FromEngine,
    Message,
    Preload,
    Preloaded,
    Retire,
    TrialDropped,
    TrialFailed,
    TrialRead,
    TrialUnreadable,
    UsedRevisions,
    Welcome,
    info_of,
    trial_compared_of,
)
from service.ipc.remote import Connection, RemoteCatalog, RemoteDrift, Requests
from service.local import engine_settings, uncertain_texts_of
from service.settings import Settings
from service.start import StartFailed

logger = logging.getLogger(__name__)

# How often texts that were counted are sent.
_REPORT_SECONDS = 0.25


class _NoCatalog(CatalogView):
    """Workers learn names from the first engine alone."""

    async def apply(self, change: Change) -> ChangeResult:
        raise EngineUnavailable(f"this engine has no catalog: {change.operation}")

    async def inspected(self, file: ReceivedFile) -> Inspection:
        raise EngineUnavailable(f"this engine has no catalog: {file.name}")


class _SentTrials(TrialListener):
    """Passes every report on."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send

    def read(
        self, name: str, candidate: str, role: Role, texts: int, seconds: float | None
    ) -> None:
        self._send(TrialRead(name, candidate, role, texts, seconds))

    def failed(self, name: str, candidate: str, revision: str, role: Role, texts: int) -> None:
        self._send(TrialFailed(name, candidate, revision, role, texts))

    def compared(self, name: str, candidate: str, pairs: Sequence[Pair]) -> None:
        self._send(trial_compared_of(name, candidate, pairs))

    def dropped(self, name: str, candidate: str, texts: int, reason: DropReason) -> None:
        self._send(TrialDropped(name, candidate, texts, reason))

    def unreadable(self, name: str, revision: str, reason: str) -> None:
        self._send(TrialUnreadable(name, revision, reason))


class FurtherBackend:
    """`service.backend.Backend` of a further engine, for the server that workers ask.

    Args:
        child: of this process; its number is the engine's.
        load: loads the backbone; called once, in a thread.

    Raises:
        UnusableBackbone: there is no such device.
    """

    def __init__(
        self,
        child: ChildContext,
        settings: Settings,
        observer: Observer,
        context: Context,
        *,
        load: Callable[[], Backbone],
    ) -> None:
        self._observer = observer
        self._device_name = child.device
        self._connection = Connection(
            context,
            child.engine_endpoints[0],
            child.number,
            receive=self._receive,
            lost=self._lost,
            max_bytes=settings.max_message_bytes,
            further=True,
        )
        requests = Requests(self._connection, observer)
        self.drift = RemoteDrift(self._connection, requests)
        self.catalog = _NoCatalog(settings.adapter_dir)
        self._followed = RemoteCatalog(settings.adapter_dir, requests)
        self._monitor = FurtherMonitor(
            texts=settings.drift_texts, uncertain=uncertain_texts_of(settings)
        )
        self.engine = LocalEngine(
            load,
            AdapterStore(settings.adapter_dir, kept=settings.kept_revisions),
            engine_settings(settings, engines=child.engines, first=False, alone=True),
            observer,
            _SentTrials(self._connection.send),
            self._monitor,
        )
        self._info: EngineInfo | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reporting: asyncio.Task[None] | None = None
        # The catalog is followed, and adapters were loaded for `PRELOADING_SECONDS` at most.
        self._warm: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Return when everything that is served was loaded, as far as there is room.

        Raises:
            StartFailed: the devices do not compute alike.
        """
        info = await self.engine.start()
        self._monitor.unknown_id = info.encoder.unknown_id
        self._info = info
        self._connection.open()
        self._reporting = asyncio.create_task(self._report())
        await self._warm
        self._observer.started(
            version=__version__,
            backbone=info.identity.name,
            device=self._device_name,
            dtype=info.dtype,
        )
        adapters = len(self._followed)
        logger.info("ready device=%s dtype=%s adapters=%d", self._device_name, info.dtype, adapters)

    async def stop(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
            self._send_counts()
        for task in self._tasks:
            task.cancel()
        self._connection.close()
        await self.engine.stop()

    def health(self) -> EngineHealth:
        return self.engine.health()

    def refuse_unless_ready(self) -> None:
        """Predictions are refused by the engine itself."""

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Welcome():
                self._welcomed(message)
            case Adapters():
                # They are of no use to an engine that computes differently.
                if self._followed.arrives:
                    self._take_over(message)
            case CatalogUpdate():
                before = self._followed.find(message.name)
                self._followed.update(message.name, message.adapter)
                if not self._followed.arrives:
                    self._follow(message.name, before)
                self._connection.send(Applied(message.update))
            case Preload():
                self._begin(self._preload(message))
            case Retire():
                self.engine.retire(AdapterKey(message.name, message.revision))
            case Forget():
                self._monitor.uncertain.forget(message.name)
            case AskUsed():
                used = sorted(self.engine.in_use(message.name))
                self._connection.send(UsedRevisions(message.id, used))

    def _welcomed(self, message: Welcome) -> None:
        assert self._info is not None
        first = info_of(message, self._info.encoder)
        ours = (self._info.identity.fingerprint, self._info.dtype)
        if ours != (first.identity.fingerprint, first.dtype):
            trouble = (
                f"IDSPAM_DEVICE: {self._device_name} computes in {self._info.dtype}, and "
                f"the first device in {first.dtype}: an answer would depend on the device; "
                "IDSPAM_DTYPE=float32 is the same on both"
            )
            if not self._warm.done():
                self._warm.set_exception(StartFailed(trouble))
            return
        self._followed.begin()
        self._monitor.begin()

    def _take_over(self, part: Adapters) -> None:
        """Follow another catalog once all of it is there."""
        before = {entry.name: entry for entry in self._followed.entries()} if part.last else {}
        self._followed.add(part)
        if not part.last:
            return
        for name in {*before, *(entry.name for entry in self._followed.entries())}:
            entry = before.get(name)
            self._follow(name, entry)
            # Meanwhile nothing told it what to give back.
            now = self._followed.find(name)
            for revision in (entry.served if entry else frozenset()) - (
                now.served if now else frozenset()
            ):
                self.engine.retire(AdapterKey(name, revision))
        self._begin(self._load_all())
        asyncio.get_running_loop().call_later(PRELOADING_SECONDS, self._set_warm)

    def _follow(self, name: str, before: CatalogEntry | None) -> None:
        entry = self._followed.find(name)
        if entry is not None:
            self._monitor.follow(name, entry.current, entry.answering)
        elif before is not None:
            self._monitor.follow(name, None, {})

    async def _load_all(self) -> None:
        keys = [
            AdapterKey(entry.name, revision)
            for entry in self._followed.entries()
            for revision in entry.answering
        ]
        await preload_all(keys, self._load_if_answering)
        self._set_warm()

    async def _load_if_answering(self, key: AdapterKey) -> None:
        # It may have been replaced or deleted before its turn came.
        entry = self._followed.find(key.name)
        if entry is not None and key.revision in entry.answering:
            await self._load(key)

    def _set_warm(self) -> None:
        if not self._warm.done():
            self._warm.set_result(None)

    async def _preload(self, message: Preload) -> None:
        await self._load(AdapterKey(message.name, message.revision))
        self._connection.send(Preloaded(message.id))

    async def _load(self, key: AdapterKey) -> None:
        try:
            await self.engine.preload(key)
        except (ServiceError, AdapterError) as error:
            logger.warning(
                "adapter not preloaded name=%s revision=%s: %s", key.name, key.revision, error
            )

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            self._connection.check()
            self._send_counts()

    def _send_counts(self) -> None:
        self._monitor.uncertain.expire()
        if texts := self._monitor.take():
            self._connection.send(Counted(texts))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _lost(self, reason: str) -> None:
        logger.warning("connection to the first engine lost: %s", reason)
