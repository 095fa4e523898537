"""`python -m service` as real processes: started, found, loaded with requests and killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from adapters.adapter import classify, prepare
from adapters.backbone.model import Backbone
from adapters.faults import VARIABLE as FAULTS_VARIABLE
from adapters.format.files import Adapter
from adapters.packed.packing import Row, RowShape

TREE = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 40.0
TEXTS = ("free win now", "my card is not good", "", "hello you call the bad card " * 3)
CLIENTS = 4


def environ(backbone: Path, adapter_dir: Path, **settings: str) -> dict[str, str]:
    """The environment of a service on a free port; settings without their prefix."""
    mine = {"BACKBONE": str(backbone), "ADAPTER_DIR": str(adapter_dir), "PORT": "0"}
    mine |= {"ZOO_DIR": "off", "DEVICE": "cpu", "DTYPE": "float32"} | settings
    of_machine = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
    kept = {key: os.environ[key] for key in of_machine if key in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return kept | offline | {f"IDSPAM_{key}": value for key, value in mine.items()}


@contextmanager
def service_process(
    environment: dict[str, str],
    *,
    stderr: int | IO[str] = subprocess.PIPE,
    python: str | Path = sys.executable,
) -> Iterator[subprocess.Popen[str]]:
    """`python -m service`, just started; killed when the block ends.

    Args:
        python: another one than that of the tests, such as `tests.support.warm_python`'s.
    """
    with subprocess.Popen(
        [python, "-m", "service", "serve"],
        cwd=TREE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


@dataclass(frozen=True)
class ReadyService:
    """A ready service with workers, and its processes as the system shows them."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    adapter_dir: Path

    def children(self) -> dict[str, int]:
        """Process ids by name: engine, engine-1, worker-0, ..."""
        pids = {}
        for pid, arguments in _processes():
            if arguments[1:3] == ["-m", "service.ipc"] and len(arguments) > 4:
                context = json.loads(arguments[4])
                if context["supervisor"] == self.process.pid:
                    # A forked engine has the arguments of its standby, and a name of its own.
                    engine, forked, number = _comm(pid).partition("idspam-engine")
                    further = f"engine-{number}" if number else "engine"
                    pids[further if forked and not engine else context["name"]] = pid
        return pids

    def folder(self) -> Path:
        """The folder of its sockets."""
        for pid, arguments in _processes():
            if pid == self.children()["engine"]:
                return Path(json.loads(arguments[4])["folder"])
        raise AssertionError("there is no engine")

    def kill(self, name: str) -> int:
        """Kill a child with SIGKILL; returns its process id."""
        pid = self.children()[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    @contextmanager
    def clients(self, workers: int) -> Iterator[list[httpx.Client]]:
        """One keep-alive connection to each worker, by its number."""
        with ExitStack() as stack:
            by_worker: dict[int, httpx.Client] = {}

            def connected() -> bool:
                client = stack.enter_context(httpx.Client(base_url=self.url, timeout=30))
                by_worker[int(client.get("/readyz").json()["details"]["worker"])] = client
                return len(by_worker) == workers

            until(connected)
            yield [by_worker[number] for number in range(workers)]

    def series(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Everything that /metrics shows."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        return self.series()[name, frozenset(labels.items())]


@contextmanager
def ready_service(
    backbone: Path, folder: Path, *, workers: int = 2, faults: str = "", **settings: str
) -> Iterator[ReadyService]:
    """A ready service with workers; afterwards no process and no folder of it is left.

    Args:
        faults: the path of the file of `adapters.faults`.
    """
    adapter_dir, log = folder / "adapters", folder / "log"
    temporary = folder / "t"
    temporary.mkdir(exist_ok=True)
    environment = environ(backbone, adapter_dir, WORKERS=str(workers), **settings)
    environment["TMPDIR"] = str(temporary)
    if faults:
        environment[FAULTS_VARIABLE] = faults
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            cwd=TREE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        running = ReadyService(process, "", log, adapter_dir)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert re.match(r"serving https?://127\.0\.0\.1:", line), log.read_text()
            running = ReadyService(process, line.split()[1], log, adapter_dir)
            yield running
            if process.poll() is None:
                process.terminate()
                assert process.wait(PATIENCE_SECONDS) == 0
        finally:
            process.kill()
            until(lambda: not running.children())
    assert not list(temporary.glob("idspam-*"))


def until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fails if it does not within `PATIENCE_SECONDS`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def _processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                arguments = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            yield int(folder.name), arguments


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def body_of(adapter: str, *texts: str) -> dict[str, Any]:
    return {"adapter": adapter, "inputs": list(texts)}


def alone(backbone: Backbone, adapter: Adapter, text: str) -> list[float]:
    """The scores of a text in a batch of its own, best first."""
    encoding = backbone.encoder.encode(text, max_length=adapter.spec.max_length)
    batch = backbone.pack([Row(encoding, RowShape.of(adapter.spec), 0)])
    (row,) = classify(backbone, batch, [prepare(adapter, backbone)])
    return sorted(row.scores.tolist(), reverse=True)


@dataclass
class Load:
    """Clients that send requests without pause, each on a connection of its own."""

    url: str
    name: str
    answers: list[tuple[int, int, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    slowest: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        for number in range(CLIENTS):
            thread = threading.Thread(target=self._ask, args=(number,))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(30)

    def statuses(self) -> set[int]:
        return {status for _, status, _ in self.answers}

    def _ask(self, turn: int) -> None:
        client = httpx.Client(base_url=self.url, timeout=30)
        while not self._done.is_set():
            turn += 1
            index = turn % len(TEXTS)
            began = time.monotonic()
            try:
                response = client.post("/v1/predict", json=body_of(self.name, TEXTS[index]))
                self.answers.append((index, response.status_code, response.json()))
            except httpx.HTTPError as error:
                # The worker died; the next connection goes to another one.
                self.errors.append(repr(error))
                client.close()
                client = httpx.Client(base_url=self.url, timeout=30)
            self.slowest = max(self.slowest, time.monotonic() - began)
            time.sleep(0.01)
        client.close()
