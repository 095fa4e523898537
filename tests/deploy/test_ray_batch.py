"""A job on Ray Data, on a Ray of its own: `python -m deploy.ray.batch` in Ray's environment.

Skipped without that environment (`make ray-setup`).
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.service_process import TREE, environ, service_process
from tests.support.tiny_models import make_adapter, save_backbone

PYTHON = TREE / "runs" / "ray" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not PYTHON.exists(), reason="runs/ray is missing: make ray-setup"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ray")
    return environ(save_backbone(folder / "backbone"), folder / "adapters")


@pytest.fixture(scope="module")
def service(environment: dict[str, str]) -> Iterator[str]:
    """The URL of a service with the adapters `a` and `b`."""
    loaded = load_backbone(environment["IDSPAM_BACKBONE"], device="cpu")
    with service_process(environment, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None
        url = running.stdout.readline().split()[1]
        for seed, name in enumerate("ab"):
            file = serialize(make_adapter(loaded, seed=seed))
            httpx.put(f"{url}/v1/adapters/{name}", content=file).raise_for_status()
        yield url


def run(environment: dict[str, str], *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PYTHON, "-m", "deploy.ray.batch", *map(str, arguments)],
        cwd=TREE,
        env=environment | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


def read(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.json"))
    assert files
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_answers_are_those_of_the_service_in_order(
    service: str, environment: dict[str, str], tmp_path: Path
) -> None:
    inputs = [
        {"text": "free win " * (index % 9), "id": f"n{index}", "adapter": "ab"[index % 2]}
        for index in range(600)
    ]
    inputs[7]["adapter"] = "none"
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in inputs))
    ended = run(
        environment,
        *(source, tmp_path / "out", "--url", service, "--adapter-column", "adapter"),
        *("--id-column", "id", "--actors", 2, "--cpus", 0.5, "--batch-size", 50),
    )
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "600 texts, 1 of them without an answer" in ended.stderr
    answers = read(tmp_path / "out")
    assert [line["id"] for line in answers] == [line["id"] for line in inputs]
    assert "none" in answers[7]["error"]
    pairs = zip(inputs, answers, strict=True)
    good = [(line, answer) for line, answer in pairs if not answer["error"]]
    body = {"inputs": [line for line, _ in good]}
    expected = httpx.post(f"{service}/v1/predict", json=body, timeout=60).json()["results"]
    for (_, answer), result in zip(good, expected, strict=True):
        for name in ("adapter", "revision", "label", "tokens", "truncated"):
            assert answer[name] == result[name]
        assert answer["score"] == pytest.approx(result["score"], abs=1e-5)


def test_what_cannot_be_done_is_said_in_one_line(
    environment: dict[str, str], tmp_path: Path
) -> None:
    for flags, complaint in (
        (("--adapters", tmp_path), "no adapters"),
        (("--url", "http://127.0.0.1:9"), "no service answers"),
    ):
        ended = run(environment, "in.jsonl", tmp_path / "out", *flags)
        assert ended.returncode == 2
        assert complaint in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr


def test_a_job_that_would_go_wrong_later_is_refused_before_it_reads_all(
    environment: dict[str, str], tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"sentence": "free win"}\n')
    backbone = load_backbone(environment["IDSPAM_BACKBONE"], device="cpu")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "a.safetensors").write_bytes(serialize(make_adapter(backbone, seed=1)))
    flags = ("--adapters", tmp_path / "adapters", "--adapter", "a")
    output = tmp_path / "out"
    ended = run(environment, source, output, *flags)
    assert ended.returncode == 2, ended.stderr
    assert "--text-column text: the input has the columns sentence" in ended.stderr
    good = run(environment, source, output, *flags, "--text-column", "sentence")
    assert good.returncode == 0, good.stderr
    before = read(output)
    again = run(environment, source, output, *flags, "--text-column", "sentence")
    assert again.returncode == 2
    assert "files are there already" in again.stderr.splitlines()[-1]
    assert read(output) == before
