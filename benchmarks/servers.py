"""The servers that are measured, each in a process of its own on a free port of loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertForSequenceClassification

from adapters.loading import locate_default

START_SECONDS = 120


class ServerFailed(Exception):
    """A server did not start; the message ends with what it printed last."""


@contextmanager
def service(folder: Path, adapters: Mapping[str, bytes], **settings: str) -> Iterator[str]:
    """This project's service with these adapters; yields its URL."""
    port = _free_port()
    environment = {
        "IDSPAM_PORT": str(port),
        "IDSPAM_ADAPTER_DIR": str(folder),
        "IDSPAM_ZOO_DIR": "off",
    }
    command = [sys.executable, "-m", "service"]
    with _process(
        command, environment | settings, f"http://127.0.0.1:{port}/readyz", folder / "service.log"
    ):
        url = f"http://127.0.0.1:{port}"
        for name, data in adapters.items():
            httpx.put(
                f"{url}/v1/adapters/{name}", content=data, headers=_BINARY, timeout=60
            ).raise_for_status()
        yield url


@contextmanager
def infinity(python: Path, model: Path, *, dtype: str, log: Path) -> Iterator[str]:
    """Infinity with a sequence classifier; yields its URL."""
    port = _free_port()
    command = [
        *(
            str(python.with_name("infinity_emb")),
            "v2",
            "--model-id",
            str(model),
            "--engine",
            "torch",
        ),
        *("--device", "cpu", "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", "classifier", "--no-bettertransformer", "--log-level", "error"),
    ]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    }
    with _process(command, environment, f"http://127.0.0.1:{port}/models", log):
        yield f"http://127.0.0.1:{port}"


def write_classifier(folder: Path) -> None:
    """The default backbone's weights under a random two-label head, as `transformers` saves a
    classifier."""
    source, revision = locate_default()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source, revision=revision)
    # Named labels: Infinity takes a configuration without any for a re-ranker.
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    model = BertForSequenceClassification(config)
    model.bert = AutoModel.from_pretrained(source, revision=revision)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, revision=revision).save_pretrained(folder)


_BINARY = {"Content-Type": "application/octet-stream"}


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], probe: str, log: Path
) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=dict(os.environ) | dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(process, probe, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], probe: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(probe, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise ServerFailed(f"{process.args!r} did not start: " + log.read_text()[-500:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
