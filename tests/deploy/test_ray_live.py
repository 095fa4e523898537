"""The service on Ray Serve for real: `python -m deploy.ray` in Ray's environment.

Skipped without that environment (`make ray-setup`), also in CI: `make ray-test` runs it.
"""

import asyncio
import hashlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone, random_adapter
from adapters.format.files import serialize
from tests.support.service_process import TREE
from tests.support.tiny_models import save_backbone

PYTHON = TREE / "runs" / "ray" / "bin" / "python"
START_SECONDS = 110.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not PYTHON.exists(), reason="runs/ray is missing: make ray-setup"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def write_config(folder: Path, **settings: str) -> Path:
    config: dict[str, Any] = yaml.safe_load((TREE / "deploy" / "ray" / "serve.yaml").read_text())
    (application,) = config["applications"]
    mine = {
        "ADAPTER_DIR": str(folder / "adapters"),
        "ZOO_DIR": "off",
        "DEVICE": "cpu",
        "DTYPE": "float32",
    }
    application["args"] = {f"IDSPAM_{key}": value for key, value in (mine | settings).items()}
    application["deployments"][0]["ray_actor_options"]["num_cpus"] = 0.5
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@contextmanager
def started(config: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    with subprocess.Popen(
        [str(PYTHON), "-m", "deploy.ray", str(config), "--port", str(port)],
        cwd=TREE,
        env=kept | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(save_backbone(folder / "backbone")), device="cpu")


@pytest.fixture(scope="module")
def running(folder: Path, backbone: Backbone) -> Iterator[tuple[subprocess.Popen[str], str]]:
    assert backbone.device.type == "cpu"
    port = free_port()
    config = write_config(folder, BACKBONE=str(folder / "backbone"))
    with started(config, port) as process:
        assert process.stdout is not None
        # Not left to the test's time limit: it would leave Ray's processes.
        watchdog = threading.Timer(START_SECONDS, process.terminate)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        assert re.match(rf"serving http://127.0.0.1:{port} on Ray", line), line
        yield process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def url(running: tuple[subprocess.Popen[str], str]) -> str:
    return running[1]


@pytest.fixture(scope="module")
def file(url: str, backbone: Backbone) -> bytes:
    """An adapter that is published as `spam`."""
    content = serialize(random_adapter(backbone, seed=3))
    answer = httpx.put(f"{url}/v1/adapters/spam", content=content, timeout=30)
    assert answer.status_code == 201, answer.text
    return content


def test_all_protocols_answer_the_same_through_rays_proxy(url: str, file: bytes) -> None:
    revision = hashlib.sha256(file).hexdigest()
    with httpx.Client(base_url=url, timeout=30) as client:
        own = client.post("/v1/predict", json={"adapter": "spam", "inputs": ["free win now"]})
        assert own.status_code == 200, own.text
        (result,) = own.json()["results"]
        assert result["revision"] == revision
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["free win now"]}
        oip = client.post("/v2/models/spam/infer", json={"inputs": [tensor]})
        assert oip.status_code == 200, oip.text
        tei = client.post("/adapters/spam", json={"inputs": "free win now"})
        assert tei.status_code == 200, tei.text
        best = max(result["scores"], key=lambda item: item["score"])
        first = tei.json()[0]
        assert (first["label"], first["score"]) == (best["label"], pytest.approx(best["score"]))
        assert client.get("/readyz").status_code == 200
        assert client.get("/openapi.json").status_code == 200
        assert "idspam_requests_total" in client.get("/metrics").text
        assert client.get("/v1/adapters/spam/file").content == file


def test_answers_name_the_replica_and_have_one_request_id(url: str, file: bytes) -> None:
    assert file
    headers = {"X-Request-ID": "mine"}
    body = {"adapter": "spam", "inputs": ["x"]}
    answer = httpx.post(f"{url}/v1/predict", json=body, headers=headers, timeout=30)
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.headers["x-replica"]


@pytest.mark.parametrize(
    ("body", "status", "type_"),
    [
        ({"adapter": "none", "inputs": ["x"]}, 404, "adapter_not_found"),
        ({"adapter": "spam", "inputs": "x", "more": 1}, 422, "invalid_request"),
    ],
)
def test_errors_are_the_services_own(url: str, body: Any, status: int, type_: str) -> None:
    answer = httpx.post(f"{url}/v1/predict", json=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, type_)
    assert httpx.get(f"{url}/nowhere", timeout=30).json()["error"]["type"] == "not_found"


def test_a_bad_adapter_is_refused_with_every_fault(url: str) -> None:
    answer = httpx.put(f"{url}/v1/adapters/bad", content=b"no adapter", timeout=30)
    assert answer.status_code == 422
    assert answer.json()["error"]["details"]


def test_what_a_client_no_longer_waits_for_is_dropped(url: str, file: bytes) -> None:
    assert file
    text = "free win now call the bad card " * 20
    body = {"adapter": "spam", "inputs": [text] * 800, "timeout_ms": 20_000}

    def in_flight() -> float:
        metrics = httpx.get(f"{url}/metrics", timeout=30).text
        return float(re.findall(r"(?m)^idspam_waiting_tokens (\S+)", metrics)[0])

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            ask = client.post
            calls = [asyncio.create_task(ask(f"{url}/v1/predict", json=body)) for _ in range(4)]
            await asyncio.sleep(0.3)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(leave())
    until = time.monotonic() + 10
    while in_flight() and time.monotonic() < until:
        time.sleep(0.1)
    assert in_flight() == 0
    answer = httpx.post(f"{url}/v1/predict", json={"adapter": "spam", "inputs": ["x"]}, timeout=30)
    assert answer.status_code == 200


def test_sigterm_answers_what_is_in_flight_and_ends(
    running: tuple[subprocess.Popen[str], str], file: bytes
) -> None:
    assert file
    process, url = running
    body = {"adapter": "spam", "inputs": ["free win now call " * 20] * 1000}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/predict", json=body, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert [answer.status_code for answer in answers] == [200]
    assert process.wait(60) == 0


def refusal(config: Path) -> str:
    """What a start that fails prints; its status is 2."""
    with started(config, free_port()) as process:
        _, error = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 2, error
        return error.splitlines()[-1]


def test_a_bad_setting_ends_the_start_with_one_line(tmp_path: Path) -> None:
    line = refusal(write_config(tmp_path, DTYPE="float64"))
    assert line.startswith("ray: ")
    assert "IDSPAM_DTYPE: 'float64'" in line


def test_a_taken_port_ends_the_start_with_one_line(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        with started(config, port) as process:
            _, error = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2, error
    assert f"cannot listen on 127.0.0.1, port {port}" in error.splitlines()[-1]


def test_sigterm_ends_a_start_that_does_not_get_ready(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    content = yaml.safe_load(config.read_text())
    # No node has so many.
    content["applications"][0]["deployments"][0]["ray_actor_options"]["num_cpus"] = 10_000
    config.write_text(yaml.safe_dump(content))
    port = free_port()
    with started(config, port) as process:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/-/routes", timeout=5)
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "ended before the service was ready" in error


def test_a_replica_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    line = refusal(write_config(tmp_path, BACKBONE=str(tmp_path / "none")))
    assert line.startswith("ray: ")
    assert str(tmp_path / "none") in line
