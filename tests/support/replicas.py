"""Replicas in one process, on one folder; each reaches it by a link of its own, which a test can
cut."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from adapters.shared.log import SharedLog
from adapters.shared.objects import ObjectStore
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone

FOLLOW_SECONDS = 0.05
LEASE_SECONDS = 1.0
_MAKING = threading.Lock()


@cache
def backbone() -> Backbone:
    """The one that adapters are made for. Models are made one at a time: torch has one seed."""
    return make_backbone()


def content(seed: int) -> bytes:
    """An adapter file. Threads may ask for it, and torch has one seed for all of them."""
    with _MAKING:
        return serialize(make_adapter(backbone(), seed=seed))


@dataclass
class Cluster:
    """A shared folder and the replicas on it, by name."""

    root: Path
    replicas: dict[str, RunningService] = field(default_factory=dict)

    @property
    def shared(self) -> Path:
        return self.root / "shared"

    def __getitem__(self, name: str) -> RunningService:
        return self.replicas[name]

    def log(self) -> SharedLog:
        """The log, as another replica would see it."""
        return SharedLog(ObjectStore(str(self.shared)))

    def cut(self, name: str) -> None:
        """From now on this replica cannot reach the store."""
        self._point(name, self.root / "gone")

    def mend(self, name: str) -> None:
        self._point(name, self.shared)

    def _point(self, name: str, target: Path) -> None:
        temporary = self.root / f"new-{name}"
        temporary.symlink_to(target)
        temporary.replace(self._link(name))

    @contextmanager
    def replica(
        self,
        name: str,
        *,
        load: Callable[[], Backbone] = make_backbone,
        cut: bool = False,
        **settings: str,
    ) -> Iterator[RunningService]:
        """One more replica, until the block ends. cut: it cannot reach the store at its start."""
        self.shared.mkdir(exist_ok=True)
        self.mend(name)
        if cut:
            self.cut(name)
        environ = {
            "ADAPTER_STORE": str(self._link(name)),
            "REPLICA": name,
            "FOLLOW_SECONDS": str(FOLLOW_SECONDS),
            "LEASE_SECONDS": str(LEASE_SECONDS),
        }
        environ |= settings
        with serve(self.root / f"cache-{name}", load=load, wait=True, **environ) as live:
            self.replicas[name] = live
            try:
                yield live
            finally:
                del self.replicas[name]
                # It must be able to leave.
                self.mend(name)

    def _link(self, name: str) -> Path:
        return self.root / f"link-{name}"


@contextmanager
def cluster(root: Path, *names: str, **settings: str) -> Iterator[Cluster]:
    """Some replicas; settings as of `serve`."""
    made = Cluster(root)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(made.replica(name, load=make_backbone, cut=False, **settings))
        yield made


def revision_at(live: RunningService, name: str) -> str | None:
    """The revision that answers; None: no such adapter."""
    response = live.client.post("/v1/predict", json={"adapter": name, "inputs": "x"})
    if response.status_code == 404:
        return None
    assert response.status_code == 200, response.text
    return str(response.json()["results"][0]["revision"])


class Asking:
    """Asks one replica for predictions without pause, in a thread; keeps when each answer was asked
    for, and what it was: a revision, or the status of an error."""

    def __init__(self, url: str, name: str) -> None:
        self.answers: list[tuple[float, str | int]] = []
        self._url = url
        self._name = name
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join(20)

    def since(self, began: float) -> list[str | int]:
        """The answers to what was asked for since then."""
        return [answer for asked, answer in self.answers if asked >= began]

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=20) as client:
            while not self._done.is_set():
                asked = time.monotonic()
                body = {"adapter": self._name, "inputs": "x"}
                response = client.post("/v1/predict", json=body)
                answer = response.status_code
                ok = answer == 200
                self.answers.append(
                    (asked, response.json()["results"][0]["revision"] if ok else answer)
                )
                time.sleep(0.002)
