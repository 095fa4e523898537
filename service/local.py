"""Engine and catalog in this process.

Starting loads the backbone, warms it up, and reads the adapter store and the zoo; then it is ready.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic

import torch

from adapters import __version__, faults
from adapters.backbone.loading import load_backbone, resolve_device
from adapters.backbone.model import Backbone
from adapters.errors import AdapterError, listing
from adapters.format.ownership import StoreLock
from adapters.format.store import AdapterStore
from adapters.format.uploads import free_bytes
from adapters.shared.cache import CachedStore
from adapters.shared.log import SharedLog
from adapters.shared.objects import ObjectStore
from service.catalog.catalog import Catalog
from service.catalog.entry import CatalogEntry
from service.catalog.preloading import PRELOADING_SECONDS, wait_at_most
from service.catalog.trials import Trials
from service.drift.local import LocalDrift
from service.drift.monitor import DriftMonitor
from service.drift.uncertain import UncertainTexts
from service.engine.engine import LocalEngine
from service.engine.interface import EngineHealth
from service.engine.observer import Observer
from service.engine.others import OtherEngines
from service.engine.settings import EngineSettings
from service.errors import EngineUnavailable, NotReady
from service.records.audit import AuditLog, audit_log
from service.replicas.catalog import ReplicaSettings, ReplicatedCatalog, replica_name
from service.settings import Settings
from service.start import StartFailed, start_error

logger = logging.getLogger(__name__)

# The most lanes on a CPU: more would only wait for Python between their matrix products.
MAX_LANES = 4
# How often the store is looked at.
STORE_SECONDS = 5.0
# How often it is looked for kept texts whose time is over.
EXPIRE_SECONDS = 10.0
# For the engine before this one to end once it has drained.
_ENDING_SECONDS = 15.0
# torch's own number of threads. Read before any lane starts, since lanes change the default.
THREADS = torch.get_num_threads()
_MIB = 2**20
# What adapters may take where nothing is set: on a CPU, and of what is free of a GPU's memory. The
# rest is for the graphs of batches and for others.
_ACTIVE_MIB = 1024
_ACTIVE_SHARE = 0.25


class LocalBackend:
    """`service.backend.Backend` in this process.

    Args:
        store: of this process; a `CachedStore` where there is a shared log.
        load: loads the backbone; called once, in a thread.
        log: what replicas share; None: this service is not a replica.
        engines, alone: as of `engine_settings`.
        device_name: what to call the device, if this process knows it by another name.

    Raises:
        UnusableBackbone: there is no such device.
    """

    def __init__(
        self,
        settings: Settings,
        store: AdapterStore,
        *,
        load: Callable[[], Backbone],
        observer: Observer,
        log: SharedLog | None = None,
        engines: int = 1,
        device_name: str = "",
        alone: bool = False,
    ) -> None:
        self._device_name = device_name
        self.trials = Trials(observer)
        self.monitor = drift_monitor(settings, observer)
        self.drift = LocalDrift(self.monitor)
        self.engine = LocalEngine(
            load,
            store,
            engine_settings(settings, engines=engines, alone=alone),
            observer,
            self.trials,
            self.monitor,
        )
        self._settings = settings
        self._store = store
        self._observer = observer
        self._catalog: Catalog | None = None
        self._log = log
        self._replica: ReplicatedCatalog | None = None
        self._preloading: asyncio.Task[None] | None = None
        self._verifying: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._lock = StoreLock(store.root, "engine")
        # Why the store cannot be changed now, if it cannot.
        self._store_trouble: str | None = None

    @property
    def catalog(self) -> Catalog:
        assert self._catalog is not None, "requests are refused until the service is ready"
        return self._catalog

    async def start(self) -> None:
        started = monotonic()
        if faults.installed():
            logger.warning("this is a test: %s makes this process fail", faults.VARIABLE)
        info = await self.engine.start()
        self.monitor.unknown_id = info.encoder.unknown_id
        # The process before this one may still be ending, with a change of its own.
        patience = self._settings.drain_seconds + _ENDING_SECONDS
        await asyncio.to_thread(self._lock.acquire, wait_seconds=patience)
        if collected := await asyncio.to_thread(self._store.collect):
            logger.info("removed what interrupted changes left items=%d", collected)
        audit = audit_log(self._settings, self._observer.audit_failed)
        catalog = self._made_catalog(audit)
        await catalog.load(self._settings.zoo_dir)
        self._preloading = asyncio.create_task(catalog.preload_all())
        await wait_at_most(PRELOADING_SECONDS, self._preloading)
        self._observer.started(
            version=__version__,
            backbone=info.identity.name,
            device=self._device_name or info.device,
            dtype=info.dtype,
        )
        self._catalog = catalog
        self._watching = asyncio.create_task(self._watch_store(catalog))
        self._verifying = asyncio.create_task(catalog.verify())
        self._sweeping = asyncio.create_task(asyncio.to_thread(self.engine.sweep_images))
        if self._settings.uncertain_texts:
            self._expiring = asyncio.create_task(self._expire_texts())
        logger.info(
            "ready backbone=%s device=%s dtype=%s adapters=%d seconds=%.1f",
            info.identity.name,
            info.device,
            info.dtype,
            len(catalog),
            monotonic() - started,
        )

    def connect(
        self,
        *,
        update: Callable[[str, CatalogEntry | None], None],
        everywhere: Callable[[], Awaitable[None]],
        renewed: Callable[[], None],
        others: OtherEngines,
    ) -> None:
        """Tell other processes what changes, once this has started; arguments are as the attributes
        of `Catalog` and `ReplicatedCatalog`."""
        self.catalog.on_update, self.catalog.others = update, others
        if self._replica is not None:
            self._replica.everywhere, self._replica.renewed = everywhere, renewed

    def _made_catalog(self, audit: AuditLog) -> Catalog:
        if self._log is None:
            return Catalog(
                self._store,
                self.engine,
                observer=self._observer,
                audit=audit,
                trials=self.trials,
                drift=self.monitor,
            )
        assert isinstance(self._store, CachedStore), "files of a replica are a cache"
        settings = replica_settings(self._settings)
        self._replica = ReplicatedCatalog(
            self._store,
            self.engine,
            self._log,
            settings,
            observer=self._observer,
            audit=audit,
            trials=self.trials,
            drift=self.monitor,
        )
        return self._replica

    async def stop(self) -> None:
        for task in (
            self._preloading,
            self._verifying,
            self._watching,
            self._expiring,
            self._sweeping,
        ):
            if task is not None:
                task.cancel()
        await self.engine.stop()
        if self._replica is not None:
            await self._replica.stop()
        self._lock.release()

    def health(self) -> EngineHealth:
        health = self.engine.health()
        if health.ready and self._catalog is None:
            reason = "reading the adapters"
            return EngineHealth(health.live, ready=False, reason=reason, details=health.details)
        details = {**health.details, "store": self._store_trouble or "ok"}
        if self._replica is None:
            return replace(health, details=details)
        details |= self._replica.details()
        lease, trouble = self._replica.lease, self._replica.trouble()
        if lease is not None and health.ready and trouble is not None:
            return replace(health, ready=False, reason=trouble, details=details, lease=lease)
        return replace(health, details=details, lease=lease)

    async def _watch_store(self, catalog: Catalog) -> None:
        """Tell whether the store can be changed, and take over a folder that was replaced."""
        while True:
            trouble, free = await asyncio.to_thread(self._look_at_store)
            if trouble != self._store_trouble:
                if trouble is None:
                    logger.info("the adapter store can be changed again")
                else:
                    logger.error("the adapter store cannot be changed: %s", trouble)
            self._store_trouble = trouble
            self._observer.store_state(usable=trouble is None, free_bytes=free)
            if trouble is None and not self._lock.is_held():
                await self._take_over(catalog)
            await asyncio.sleep(STORE_SECONDS)

    async def _expire_texts(self) -> None:
        """Forget texts whose time is over, also while nothing is asked."""
        while True:
            await asyncio.sleep(EXPIRE_SECONDS)
            self.monitor.uncertain.expire()

    def _look_at_store(self) -> tuple[str | None, int]:
        trouble = self._store.trouble()
        try:
            return trouble, free_bytes(self._store.root)
        except OSError:
            return trouble, 0

    async def _take_over(self, catalog: Catalog) -> None:
        """The folder is another one than at the start: serve what it holds."""
        logger.warning("the adapter store's folder was replaced: it is read again")
        try:
            await asyncio.to_thread(self._lock.acquire)
            await asyncio.to_thread(self._store.collect)
            await catalog.reconcile()
        except (AdapterError, OSError) as error:
            self._store_trouble = str(error)
            logger.error("the adapter store cannot be used: %s", error)

    def refuse_unless_ready(self) -> None:
        if self._catalog is None:
            health = self.health()
            raise (NotReady if health.live else EngineUnavailable)(health.reason or "starting")
        if self._replica is not None:
            self._replica.refuse_unless_fresh()


def backbone_loader(settings: Settings) -> Callable[[], Backbone]:
    """Loads the settings' backbone."""
    return partial(load_backbone, settings.backbone, device=settings.device, dtype=settings.dtype)


def local_backend(
    settings: Settings,
    observer: Observer,
    *,
    load: Callable[[], Backbone] | None = None,
    engines: int = 1,
    device_name: str = "",
    alone: bool = False,
) -> LocalBackend:
    """The backend that the settings describe.

    Args:
        load: as of `LocalBackend`; by default it loads the settings' backbone.
        engines, device_name, alone: as of `LocalBackend`.

    Raises:
        StartFailed: there is no such device, or the adapter folder cannot be used.
    """
    load = load or backbone_loader(settings)
    try:
        if settings.adapter_store is None:
            store = AdapterStore(settings.adapter_dir, kept=settings.kept_revisions)
            return LocalBackend(
                settings,
                store,
                load=load,
                observer=observer,
                engines=engines,
                device_name=device_name,
                alone=alone,
            )
        # A call that hangs for longer than the lease is of no use.
        objects = ObjectStore(settings.adapter_store, timeout=max(1.0, settings.lease_seconds))
        _refuse_single(settings.adapter_dir)
        cache = CachedStore(settings.adapter_dir, objects, max_bytes=settings.cache_mib * _MIB)
        return LocalBackend(
            settings, cache, load=load, observer=observer, log=SharedLog(objects), alone=alone
        )
    except ValueError as error:
        raise StartFailed(f"IDSPAM_ADAPTER_STORE: {error}") from None
    except (AdapterError, OSError) as error:
        raise StartFailed(start_error(error)) from None


def _refuse_single(folder: Path) -> None:
    """A cache removes files, and these are nowhere else.

    Raises:
        StartFailed: the folder is the store of a service without a shared one.
    """
    if folder.is_dir() and (names := AdapterStore(folder).names()):
        raise StartFailed(
            f"IDSPAM_ADAPTER_DIR: {folder} has the adapters of a service without a shared store "
            f"({listing(names, 3)}): a replica needs a folder of its own, and these are published "
            "as new ones"
        )


def replica_settings(settings: Settings) -> ReplicaSettings:
    """Those of a service with a shared store."""
    return ReplicaSettings(
        name=replica_name(settings.replica),
        follow_seconds=settings.follow_seconds,
        lease_seconds=settings.lease_seconds,
        rollout_seconds=settings.rollout_seconds,
        stale=settings.stale == "serve",
        kept=settings.kept_revisions,
    )


def drift_monitor(settings: Settings, observer: Observer) -> DriftMonitor:
    """What counts texts and keeps some of them, as the settings say."""
    return DriftMonitor(
        observer, texts=settings.drift_texts, uncertain=uncertain_texts_of(settings)
    )


def uncertain_texts_of(settings: Settings) -> UncertainTexts:
    """What keeps texts to be labelled, as the settings say."""
    return UncertainTexts(
        texts=settings.uncertain_texts,
        max_bytes=settings.uncertain_mib * _MIB,
        seconds=settings.uncertain_hours * 3600.0,
    )


def engine_settings(
    settings: Settings, *, engines: int = 1, first: bool = True, alone: bool = False
) -> EngineSettings:
    """
    Args:
        engines: of this host's service, which share its cores.
        first: this is the one that writes to the adapter folder.
        alone: it has a process of its own, with an event loop that does nothing else.

    Raises:
        UnusableBackbone: there is no such device.
    """
    device = resolve_device(settings.device).type
    on_gpu = device == "cuda"
    active_mib = settings.max_active_mib
    if active_mib is None and not on_gpu:
        active_mib = _ACTIVE_MIB
    registered_mib = settings.max_registered_mib or 4 * (active_mib or _ACTIVE_MIB)
    return EngineSettings(
        max_batch_tokens=settings.batch_tokens(device),
        max_waiting_tokens=settings.max_waiting_tokens,
        adapter_weights=settings.adapter_weights,
        max_active_adapters=settings.max_active_adapters,
        max_active_bytes=None if active_mib is None else active_mib * _MIB,
        active_share=_ACTIVE_SHARE if active_mib is None else None,
        max_registered_adapters=settings.max_registered_adapters
        or 4 * settings.max_active_adapters,
        max_registered_bytes=registered_mib * _MIB,
        max_image_bytes=settings.images_mib * _MIB or None,
        writes_images=first,
        one_core=settings.one_core and on_gpu and alone,
        beside_http=not alone,
        lanes=1 if on_gpu else settings.cpu_lanes or min(MAX_LANES, max(1, THREADS // engines)),
    )
