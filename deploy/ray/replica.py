"""One replica of the service, as Ray Serve keeps it: engine, catalog and all routes in a process.

Ray starts it, asks after its health, routes requests to it and ends it. Everything else is the
service's own: `service.local`, `service.http`.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from ray import serve
from ray.serve.context import _get_global_client
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import AdapterError, StoreInUse
from adapters.format.ownership import StoreLock
from deploy.ray.arguments import in_folder, replica_settings
from deploy.ray.headers import REPLICA
from service.access.exposure import log_access
from service.engine.observer import BatchReport
from service.http.app import create_app, route_paths
from service.http.errors import error_types
from service.http.lifecycle import Service
from service.local import local_backend
from service.observability.logs import configure_logging
from service.observability.metrics import ENGINE, Metrics
from service.records.audit import check_audit_log
from service.records.decisions import check_decision_log
from service.settings import Settings
from service.start import StartFailed, start_error

logger = logging.getLogger(__name__)

# A replica that is not ready gets no requests. After so long it is replaced: another node may reach
# what this one does not. Long, because a store that is out of reach for one is mostly so for all:
# new replicas could not start meanwhile, and would have to load the backbone afterwards.
UNREADY_SECONDS = 300.0
# Names in a routing report. Each report goes to every proxy.
REPORTED_ADAPTERS = 256
# For the replica before this one to end once it has drained.
_ENDING_SECONDS = 15.0
# More replicas on a node than anybody starts.
_FOLDERS = 1000


class Unhealthy(Exception):
    """Why Serve should replace this replica."""


class Replica:
    """The deployment's class, `serve.ingress` around it: `deploy.ray.app`.

    Args:
        values: settings, as `deploy.ray.arguments.checked` gives them.

    Raises:
        StartFailed: the settings or the machine do not allow it; one line says why.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, values: Mapping[str, str]
    ) -> None:
        try:
            await self._start(values)
        except (StartFailed, AdapterError, OSError, ValueError) as error:
            # Serve shows the traceback of what is raised here; this is its last line.
            raise StartFailed(start_error(error)) from None

    async def _start(self, values: Mapping[str, str]) -> None:
        context = serve.get_replica_context()
        self._tag = context.replica_tag.encode()
        host = await asyncio.to_thread(_proxy_host)
        settings = replica_settings(os.environ, values, host=host)
        if settings.adapter_store is None:
            _refuse_second(context.rank.rank)
            # The only copy: the replica before this one has to give it up first.
            self._lock = await asyncio.to_thread(_wait_for_folder, settings)
        else:
            folder, self._lock = await asyncio.to_thread(_claim_folder, settings.adapter_dir)
            settings = in_folder(settings, folder)
        check_audit_log(settings)
        check_decision_log(settings)
        configure_logging(settings.log_level, settings.log_format)
        log_access(settings)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._metrics = _Metrics(registry, routes=route_paths(), error_types=error_types())
        self._backend = local_backend(settings, self._metrics)
        app = create_app(settings, self._backend, self._metrics)
        # With its type: an attribute of the app's state has none, and nothing would be checked.
        self._service: Service = app.state.service
        self._app = _Answers(app, self._tag)
        self._unready_since: float | None = None
        self._counted = (monotonic(), 0)
        await self._service.start()
        try:
            await self._service.starting
        except BaseException:
            await self._service.stop()
            raise

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve for the app. Its lifespan is this object's."""
        return self._app

    async def check_health(self) -> None:
        """Called by Serve now and then; a replica that fails three times running is replaced.

        Raises:
            Unhealthy: the engine is dead, or the replica has not been ready for a while: its lease
                has ended, its store cannot be reached.
        """
        health = self._service.health()
        if not health.live:
            raise Unhealthy(health.reason or "the engine has ended")
        if health.ready:
            self._unready_since = None
            return
        self._unready_since = since = self._unready_since or monotonic()
        if monotonic() - since > UNREADY_SECONDS:
            raise Unhealthy(f"not ready for {UNREADY_SECONDS:g} s: {health.reason}")

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the routers know of this replica: `deploy.ray.choice.Seen`."""
        load = self._backend.engine.load
        tokens = self._waiting_tokens()
        return {
            "ready": self._service.health().ready,
            "adapters": self._backend.engine.active_adapters(REPORTED_ADAPTERS),
            # Rounded: a report that says the same is not sent.
            "wait": round(tokens / load.rate, 2) if load.rate else 0.0,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deploy.ray.autoscaling.WaitingTokens` decides by."""
        (began, before), now = self._counted, monotonic()
        self._counted = (now, self._metrics.tokens)
        return {
            "waiting_tokens": float(self._waiting_tokens()),
            "tokens_per_second": (self._metrics.tokens - before) / max(1e-3, now - began),
            "device_tokens_per_second": self._backend.engine.load.rate,
        }

    def _waiting_tokens(self) -> int:
        return int(self._backend.engine.health().details.get("waiting_tokens", 0))

    async def __del__(self) -> None:
        """Called by Serve when all requests are answered, or too long after it asked to end."""
        if hasattr(self, "_service"):
            await self._service.drain()
            self._lock.release()


class _Metrics(Metrics):
    """Also counts what the device has computed: tokens since the start."""

    tokens = 0

    def batch_done(self, report: BatchReport, engine: str = ENGINE) -> None:
        self.tokens += report.tokens
        super().batch_done(report, engine)


class _Answers:
    """The app without its lifespan, which is the replica's; answers say whose they are."""

    def __init__(self, app: ASGIApp, tag: bytes) -> None:
        self._app, self._tag = app, tag

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REPLICA, self._tag)]
            await send(message)

        await self._app(scope, receive, tagged)


async def _lifespan(receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


def _proxy_host() -> str:
    """Where Ray's proxies listen. Serve has no public way to ask."""
    return str(_get_global_client().http_config.host)


def _refuse_second(rank: int) -> None:
    if rank:
        raise StartFailed(
            "IDSPAM_ADAPTER_STORE: more than one replica needs a store that all of them share; "
            "set it, or max_replicas: 1"
        )


def _wait_for_folder(settings: Settings) -> StoreLock:
    """
    Raises:
        OSError: the folder cannot be made.
        StoreInUse: somebody has it for longer than a drain takes.
    """
    settings.adapter_dir.mkdir(parents=True, exist_ok=True)
    lock = StoreLock(settings.adapter_dir, "service")
    lock.acquire(wait_seconds=settings.drain_seconds + _ENDING_SECONDS)
    return lock


def _claim_folder(parent: Path) -> tuple[Path, StoreLock]:
    """A folder of this replica's own below the setting's, with its lock.

    A replica that starts after another has ended gets that one's folder, and what is in it.

    Raises:
        OSError: it cannot be made.
        StoreInUse: there are too many.
    """
    for number in range(_FOLDERS):
        folder = parent / f"replica-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = StoreLock(folder, "service")
        try:
            lock.acquire()
        except StoreInUse:
            continue
        return folder, lock
    raise StoreInUse(f"all folders of {parent} are in use")
