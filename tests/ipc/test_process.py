"""`python -m service` as a process: how it starts, refuses to start, and ends."""

import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.families import save
from tests.support.http_service import error_of, until
from tests.support.service_process import environ, service_process
from tests.support.tiny_models import make_adapter
from tests.support.warm_python import warm_python

# Each test starts processes.
pytestmark = pytest.mark.slow


def test_sigterm_flips_ready_then_answers_what_is_in_flight_then_exits_0(
    tmp_path: Path, folder: Path
) -> None:
    # Enough texts for the device to be busy for a while after the signal, and enough time for them
    # on a machine that does other things, too.
    texts, seconds = 3000, 80
    limits = {
        "MAX_INPUTS": str(texts),
        "MAX_WAITING_TOKENS": "1000000",
        "DRAIN_SECONDS": str(seconds),
    }
    with service_process(environ(folder, tmp_path, **limits)) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:")
        assert f"backbone={folder} device=cpu dtype=float32 adapters=0" in line
        url = line.split()[1]
        adapter = make_adapter(load_backbone(str(folder), device="cpu"), max_length=64)
        with httpx.Client(base_url=url, timeout=30) as client:
            assert client.put("/v1/adapters/a", content=serialize(adapter)).status_code == 201
            body = {
                "adapter": "a",
                "inputs": ["the card is not good " * 12] * texts,
                "timeout_ms": seconds * 1000,
            }
            answers: list[httpx.Response] = []
            asking = threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{url}/v1/predict", json=body, timeout=seconds)
                )
            )
            asking.start()
            until(lambda: client.get("/readyz").json()["details"]["waiting_entries"] > 0)
            running.send_signal(signal.SIGTERM)
            # On new connections: draining closes idle ones, maybe as a request is on its way.
            until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
            assert httpx.get(f"{url}/readyz").json()["reason"] == "draining"
            assert httpx.get(f"{url}/healthz").status_code == 200
            refused = httpx.post(f"{url}/v1/predict", json={"adapter": "a", "inputs": "x"})
            assert refused.status_code == 503
            assert error_of(refused)["type"] == "unavailable"
            asking.join()
        assert answers[0].status_code == 200
        assert len(answers[0].json()["results"]) == texts
        assert running.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_connection_in_use_is_told_to_close_before_it_is_closed(
    tmp_path: Path, folder: Path, workers: str
) -> None:
    """A client that goes on asking on one connection gets an answer each time, and no reset."""
    with service_process(environ(folder, tmp_path, WORKERS=workers)) as running:
        assert running.stdout is not None
        host, port = running.stdout.readline().split()[1].removeprefix("http://").split(":")
        connection = HTTPConnection(host, int(port), timeout=10)
        headers, status = {}, 0
        for turn in range(100_000):
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            answer.read()
            status, headers = answer.status, dict(answer.getheaders())
            if turn == 20:
                running.send_signal(signal.SIGTERM)
            if headers.get("connection") == "close":
                break
        # 200 if the service was just answering when the signal came.
        assert headers.get("connection") == "close"
        assert status in (200, 503)
        assert running.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_clients_that_connect_until_the_end_are_answered_or_refused(
    tmp_path: Path, folder: Path, workers: str
) -> None:
    """Two dozen that open a connection for each request: nobody is reset who was let in."""
    ends: Counter[int | str] = Counter()

    def ask_until_refused(host: str, port: int) -> None:
        while True:
            connection = HTTPConnection(host, port, timeout=20)
            try:
                connection.request("GET", "/readyz")
                answer = connection.getresponse()
                answer.read()
                ends[answer.status] += 1
            except ConnectionRefusedError:
                ends["refused"] += 1
                return
            except (OSError, HTTPException):
                ends["reset"] += 1
            finally:
                connection.close()

    with service_process(environ(folder, tmp_path, WORKERS=workers)) as running:
        assert running.stdout is not None
        host, port = running.stdout.readline().split()[1].removeprefix("http://").split(":")
        with ThreadPoolExecutor(24) as clients:
            for _ in range(24):
                clients.submit(ask_until_refused, host, int(port))
            until(lambda: ends[200] > 100)
            running.send_signal(signal.SIGTERM)
            assert running.wait(20) == 0
    assert ends["refused"] == 24
    assert ends[503]
    # A process that is suspended as it closes may still lose some, but not one for each client.
    assert ends["reset"] <= 12, ends


def test_sigterm_while_idle_exits_0_at_once(tmp_path: Path, folder: Path) -> None:
    with service_process(environ(folder, tmp_path)) as running:
        assert running.stdout is not None
        running.stdout.readline()
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
        assert time.monotonic() - started < 5
        assert running.stderr is not None
        assert "Traceback" not in running.stderr.read()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Python that has loaded torch, for services that cannot start."""
    with warm_python(tmp_path_factory.mktemp("warm"), HF_HUB_OFFLINE="1") as python:
        yield python


def refusals(tmp_path: Path, folder: Path) -> dict[str, tuple[dict[str, str], str]]:
    """Services that cannot start, by name: the environment, and words of the one line."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    adapter_dir, gpt2 = tmp_path / "adapters", tmp_path / "gpt2"
    save("gpt2", gpt2)
    return {
        "adapter folder": (environ(folder, tmp_path / "file"), "IDSPAM_ADAPTER_DIR"),
        "below a file": (environ(folder, tmp_path / "file" / "x"), "IDSPAM_ADAPTER_DIR"),
        "empty backbone": (
            environ(tmp_path / "empty", adapter_dir),
            "service: IDSPAM_BACKBONE: cannot load the config of the backbone",
        ),
        "empty backbone, workers": (
            environ(tmp_path / "empty", adapter_dir, WORKERS="1"),
            "service: IDSPAM_BACKBONE: cannot load the config of the backbone",
        ),
        "device": (
            environ(folder, adapter_dir, DEVICE="cuda:77"),
            "IDSPAM_DEVICE: device 'cuda:77'",
        ),
        "int8": (environ(gpt2, adapter_dir, DTYPE="int8"), "IDSPAM_DTYPE: dtype 'int8'"),
        "float8": (
            environ(folder, adapter_dir, DEVICE="cpu", DTYPE="float8"),
            "needs a GPU with FP8 tensor cores",
        ),
        "int8, workers": (
            environ(gpt2, adapter_dir, DTYPE="int8", WORKERS="1"),
            "IDSPAM_DTYPE: dtype 'int8'",
        ),
        "host": (environ(folder, adapter_dir, HOST="256.1.1.1"), "cannot listen on 256.1.1.1"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "adapter folder",
        "below a file",
        "empty backbone",
        "empty backbone, workers",
        "device",
        "int8",
        "float8",
        "int8, workers",
        "host",
    ],
)
def test_what_cannot_start_says_so_in_one_line_with_status_2(
    tmp_path: Path, folder: Path, warm: Path, case: str
) -> None:
    environment, words = refusals(tmp_path, folder)[case]
    with service_process(environment, python=warm) as running:
        output, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert output == ""
    last = errors.splitlines()[-1]
    assert last.startswith("service: ")
    assert words in last
    assert "Traceback" not in errors


def test_an_occupied_port_is_reported_in_one_line_with_status_2(
    tmp_path: Path, folder: Path, warm: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with service_process(environ(folder, tmp_path, PORT=str(port)), python=warm) as running:
            _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert errors.splitlines()[-1].startswith(f"service: cannot listen on 127.0.0.1:{port}: ")
    assert errors.endswith("; IDSPAM_PORT names another port\n")
    assert "Traceback" not in errors
