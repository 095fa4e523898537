"""The whole service on a real socket: uvicorn in a thread, over a tiny random backbone.

Nothing of the service is replaced. `Brake` holds a batch on the device for tests that need one.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, serialize
from service.http.app import create_app, route_paths
from service.http.errors import error_types
from service.http.lifecycle import Service
from service.http.server import Server, listen, url_of
from service.local import local_backend
from service.observability.metrics import Metrics
from service.settings import Settings, read_settings
from tests.support.tiny_models import make_backbone

PATIENCE_SECONDS = 20.0


class Brake:
    """Loads backbones whose first layer waits while the brake is on, which holds their batch."""

    def __init__(self) -> None:
        self._released, self._held = threading.Event(), threading.Event()
        self._released.set()

    def load(self) -> Backbone:
        backbone = make_backbone()
        backbone._layers[0].register_forward_pre_hook(lambda *_: self._wait())
        return backbone

    def on(self) -> None:
        self._held.clear()
        self._released.clear()

    def off(self) -> None:
        self._released.set()

    @property
    def holds(self) -> bool:
        """Whether a batch waits, or has waited, since the brake was put on."""
        return self._held.is_set()

    def _wait(self) -> None:
        if not self._released.is_set():
            self._held.set()
        assert self._released.wait(PATIENCE_SECONDS), "the brake was never released"


@dataclass(frozen=True)
class RunningService:
    """A service that runs, and a client of it."""

    url: str
    app: FastAPI
    client: httpx.Client
    service: Service
    adapter_dir: Path

    def put(self, name: str, adapter: Adapter, **headers: str) -> str:
        """Publish an adapter, whatever it replaces, and return its revision."""
        response = self.client.put(
            f"/v1/adapters/{name}?force=true", content=serialize(adapter), headers=headers
        )
        assert response.status_code in (200, 201), response.text
        return str(response.json()["revision"])

    def predict(self, **body: Any) -> dict[str, Any]:
        """The answer of a predict request, which must succeed."""
        response = self.client.post("/v1/predict", json=body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series; it must exist."""
        return self.series()[name, frozenset(labels.items())]

    def series(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every series of /metrics, by name and labels."""
        text = self.client.get("/metrics").text
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


class _Server(Server):
    """Leaves the garbage collector as it is, and goes on if the service could not start."""

    loop: asyncio.AbstractEventLoop | None = None

    def _started(self, starting: "asyncio.Task[None]") -> None:
        self.loop = starting.get_loop()


class _Transport(httpx.HTTPTransport):
    """Returns an answer once the service has done what follows it: its line in the log, its spans.

    Client and service share an interpreter, so the client may have the last byte before that.
    """

    def __init__(self, server: _Server) -> None:
        super().__init__()
        self._server = server

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if self._server.loop is not None:
            done = threading.Event()
            # A loop that has ended has done everything.
            with suppress(RuntimeError):
                self._server.loop.call_soon_threadsafe(done.set)
                done.wait(1)
        return response


def make_app(settings: Settings, load: Callable[[], Backbone]) -> FastAPI:
    """The app with everything in this process."""
    metrics = Metrics(CollectorRegistry(), routes=route_paths(), error_types=error_types())
    return create_app(settings, local_backend(settings, metrics, load=load), metrics)


@contextmanager
def serve(
    adapter_dir: Path,
    *,
    load: Callable[[], Backbone] = make_backbone,
    wait: bool = True,
    host: str = "127.0.0.1",
    **settings: str,
) -> Iterator[RunningService]:
    """A service that runs until the block ends.

    Args:
        wait: until it is ready.
        host: where it listens.
        settings: as in the environment, without the prefix. PORT is by default any free one.
    """
    # One lane, so that a test that holds one batch holds the whole device.
    environ = {"IDSPAM_ZOO_DIR": "off", "IDSPAM_CPU_LANES": "1"} | {
        f"IDSPAM_{key}": value for key, value in settings.items()
    }
    app = make_app(read_settings(environ | {"IDSPAM_ADAPTER_DIR": str(adapter_dir)}), load)
    listener = listen(host, int(settings.get("PORT", "0")))
    server = _Server(app, app.state.service, url=url_of(listener), announce=lambda _: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    service = app.state.service
    try:
        with httpx.Client(
            base_url=url_of(listener), timeout=PATIENCE_SECONDS, transport=_Transport(server)
        ) as client:
            if wait:
                until(lambda: client.get("/readyz").status_code == 200)
            yield RunningService(str(client.base_url), app, client, service, adapter_dir)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        listener.close()
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, which must hold within `PATIENCE_SECONDS`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def error_of(response: httpx.Response) -> Mapping[str, Any]:
    """The error of a response, which must have this project's shape."""
    content = response.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"type", "message", "details"}
    return dict(content["error"])
