"""Starts the servers that are measured, each in its own processes on a free port of loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertForSequenceClassification

from adapters.backbone.loading import locate_default
from benchmarks.report import BenchmarkFailed

# Enough to read, hash and warm up a backbone of a gigabyte, and to list thousands of adapters.
START_SECONDS = 240.0
_STOP_SECONDS = 45.0
_TREE = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Server:
    """Its address, and the process that started all its others."""

    url: str
    pid: int


@contextmanager
def service(store: Path, *, log: Path, **settings: str) -> Iterator[Server]:
    """This project's service over a store; settings are named without their prefix."""
    port = _free_port()
    defaults = {
        "PORT": str(port),
        "ADAPTER_DIR": str(store),
        "ZOO_DIR": "off",
        "LOG_LEVEL": "warning",
    }
    environment = {f"IDSPAM_{key}": value for key, value in (defaults | settings).items()}
    url = f"http://127.0.0.1:{port}"
    with _process(
        [sys.executable, "-m", "service", "serve"], environment, f"{url}/readyz", log
    ) as pid:
        yield Server(url, pid)


def settings_of(options: Namespace) -> dict[str, str]:
    """The settings for `--device`, `--dtype` and `--workers`."""
    settings = {"DEVICE": options.device, "DTYPE": options.dtype}
    return settings | ({"WORKERS": str(options.workers)} if options.workers else {})


def processes_of(options: Namespace) -> str:
    """How a table describes `--workers`."""
    return f"{options.workers} HTTP workers" if options.workers else "one process"


@contextmanager
def infinity(python: Path, model: Path, *, dtype: str, log: Path) -> Iterator[Server]:
    """Infinity with a sequence classifier."""
    port = _free_port()
    command = [
        *(str(python.with_name("infinity_emb")), "v2", "--model-id", str(model)),
        *("--engine", "torch", "--device", "cpu", "--dtype", dtype),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", "classifier", "--no-bettertransformer", "--log-level", "error"),
    ]
    environment = {"INFINITY_ANONYMOUS_USAGE_STATS": "0", **_OFFLINE}
    url = f"http://127.0.0.1:{port}"
    with _process(command, environment, f"{url}/models", log) as pid:
        yield Server(url, pid)


@contextmanager
def litserve(python: Path, model: Path, *, dtype: str, log: Path) -> Iterator[Server]:
    """LitServe with the same classifier, and with its own dynamic batching."""
    port = _free_port()
    command = [str(python), "-m", "benchmarks.litserve_app", str(model), dtype, str(port)]
    url = f"http://127.0.0.1:{port}"
    with _process(command, _OFFLINE, f"{url}/health", log) as pid:
        yield Server(url, pid)


@contextmanager
def vllm(
    python: Path, model: Path, *, adapters: Mapping[str, Path], rank: int, dtype: str, log: Path
) -> Iterator[Server]:
    """vLLM with a sequence classifier and its LoRA adapters, by name; all of them in its slots."""
    port = _free_port()
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--runner", "pooling"),
        *("--model", str(model), "--served-model-name", "classifier", "--dtype", dtype),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
    ]
    if adapters:
        modules = [f"{name}={folder}" for name, folder in adapters.items()]
        command += ["--enable-lora", "--max-loras", str(len(adapters))]
        command += ["--max-lora-rank", str(rank), "--lora-modules", *modules]
    # There is no cache of keys and values in a classifier; vLLM would reserve half of the memory.
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **_OFFLINE}
    url = f"http://127.0.0.1:{port}"
    with _process(command, environment, f"{url}/health", log) as pid:
        yield Server(url, pid)


def write_classifier(folder: Path) -> None:
    """Save a classifier: the default backbone's weights and a random head of two labels."""
    source = locate_default()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source)
    # With label names: without them Infinity takes the model for a re-ranker.
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    model = BertForSequenceClassification(config)
    model.bert = AutoModel.from_pretrained(source)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


_OFFLINE: Mapping[str, str] = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], probe: str, log: Path
) -> Iterator[int]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=dict(os.environ) | dict(environment),
            cwd=_TREE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A process group of its own, so that all of it can be killed.
            start_new_session=True,
        )
    try:
        _wait(process, probe, log)
        yield process.pid
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], probe: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(probe, timeout=5) as response:
                if response.status == 200:
                    return
        except (URLError, HTTPException, OSError):
            pass
        time.sleep(0.2)
    raise BenchmarkFailed(f"{process.args!r} did not start: " + log.read_text()[-500:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
