"""The OpenAPI document and the service agree: schemathesis runs all its checks on every operation.

`make api-fuzz` is a longer run, with other requests each time.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.key_files import bearer, write_keys
from tests.support.service_process import TREE, environ, service_process
from tests.support.tiny_models import make_adapter, save_backbone

EXAMPLES = os.environ.get("API_FUZZ_EXAMPLES")
WORKERS = os.environ.get("API_FUZZ_WORKERS", "0")
CONFIG = TREE / "tests" / "support" / "schemathesis.toml"


@pytest.mark.slow
@pytest.mark.timeout(3600 if EXAMPLES else 300)
def test_schemathesis_finds_no_failure_of_any_check(tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path / "backbone")
    loaded = load_backbone(str(backbone), device="cpu")
    for seed, name in enumerate(("sms-spam", "other", "third")):
        file = serialize(make_adapter(loaded, seed=seed, max_length=128))
        (tmp_path / f"{name}.safetensors").write_bytes(file)
    keys = tmp_path / "keys.jsonl"
    key = bearer(write_keys(keys, everything={})["everything"])
    settings = {"DEFAULT_ADAPTER": "sms-spam", "WORKERS": WORKERS, "KEYS_FILE": str(keys)}
    # See `before_call` in the hooks.
    settings |= {"TRUSTED_PROXIES": "127.0.0.1", "UNCERTAIN_TEXTS": "5"}
    environment = environ(backbone, tmp_path / "adapters", **settings)
    with (
        (tmp_path / "log").open("w") as log,
        service_process(environment, stderr=log) as running,
    ):
        assert running.stdout is not None
        url = running.stdout.readline().split()[1]
        for name in ("sms-spam", "other"):
            file = (tmp_path / f"{name}.safetensors").read_bytes()
            answer = httpx.put(f"{url}/v1/adapters/{name}", content=file, headers=key)
            answer.raise_for_status()
        # In CI the same requests each time.
        repeated = ["--generation-database", "none"] if EXAMPLES else ["--generation-deterministic"]
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
        command += [f"--header=Authorization: {key['Authorization']}"]
        command += [f"{url}/openapi.json", "--checks", "all", "--no-color", *repeated]
        ended = subprocess.run(
            [*command, "--max-examples", EXAMPLES or "20"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(TREE)}
            | {"API_FUZZ_FILES": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, _shortened(ended.stdout) + ended.stderr[-2000:]
        tested = re.search(r"Tested: (\d+)", ended.stdout)
        generated = re.search(r"(\d+) generated", ended.stdout)
        assert tested, ended.stdout
        assert generated, ended.stdout
        # Every operation, and enough requests for the checks to mean something.
        assert int(tested[1]) == _operations(url)
        assert int(generated[1]) > 1000
        # Nothing that was sent is an unexpected error, or ended the service.
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert "Traceback" not in (tmp_path / "log").read_text()


def _operations(url: str) -> int:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    return sum(len(operations) for operations in paths.values())


def _shortened(report: str) -> str:
    """Without the bytes of adapters in its commands."""
    return "\n".join(line[:500] for line in report.splitlines())
