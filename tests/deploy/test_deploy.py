"""The container and the compose file agree with the code; `make compose-test` runs them."""

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from adapters import __version__
from service.settings import Settings, variable
from tests.support.http_service import serve
from tests.support.service_process import TREE

COMPOSE = (TREE / "deploy" / "compose.yaml").read_text()
DOCKERFILE = (TREE / "Dockerfile").read_text()
UNIT = TREE / "deploy" / "id-spam.service"
# A supervisor takes at most this long in addition to draining.
ENDING_SECONDS = 15.0


def script(path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TREE / path), *arguments],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def default(name: str) -> str:
    """The default of a variable of the compose file."""
    (value,) = set(re.findall(rf"\$\{{{name}:-([^}}]*)\}}", COMPOSE))
    return str(value)


def test_every_setting_is_passed_on_or_fixed() -> None:
    settings = {variable(item.name) for item in fields(Settings)}
    block = COMPOSE[COMPOSE.index("x-settings:") : COMPOSE.index("\nservices:")]
    named = re.findall(r"(?m)^  (IDSPAM_\w+):(.*)$", block)
    # Each of the two services sets its own device.
    assert {name for name, _ in named} == settings - {"IDSPAM_DEVICE"}
    assert COMPOSE.count("{<<: *settings, IDSPAM_DEVICE:") == 2
    assert {name for name, value in named if value} == {
        "IDSPAM_HOST",
        "IDSPAM_PORT",
        "IDSPAM_ADAPTER_DIR",
        "IDSPAM_PUBLISHED",
    }


def of_unit(name: str) -> list[str]:
    """The values of an option of the systemd unit."""
    return re.findall(rf"(?m)^{name}=(.*)$", UNIT.read_text())


def test_the_unit_has_the_bounds_and_folders_of_the_container() -> None:
    assert of_unit("TimeoutStopSec") == [default("STOP_GRACE")]
    assert of_unit("MemoryMax") == [default("SERVICE_MEMORY").upper()]
    assert of_unit("StartLimitBurst") == re.findall(r"restart: on-failure:(\d+)", COMPOSE)
    places = {"%S": "/var/lib", "%C": "/var/cache"}
    ours = {re.sub("%[SC]", lambda at: places[at[0]], item) for item in of_unit("Environment")}
    command = DOCKERFILE[DOCKERFILE.rindex("ENV PATH") :]
    theirs = set(re.findall(r"(\w+=\S+)", command[: command.index("USER")]))
    # A unit listens on loopback, and names its Python.
    assert theirs - ours == {"PATH=/opt/venv/bin:$PATH", "IDSPAM_HOST=0.0.0.0"}
    assert ours <= theirs


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not there")
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    """Verifying asks for a program and a user that exist."""
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", UNIT.read_text())
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"(?m)^(User|Group)=.*$", r"\1=root", text))
    for check in (
        ["verify", str(unit)],
        ["security", "--offline=true", "--threshold=25", str(UNIT)],
    ):
        done = subprocess.run(
            ["systemd-analyze", *check], capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert check[0] == "security" or not done.stderr


def test_a_container_is_given_time_to_drain() -> None:
    assert float(default("STOP_GRACE").removesuffix("s")) >= (
        Settings().drain_seconds + ENDING_SECONDS
    )


def test_no_variable_stands_for_a_number() -> None:
    """Compose v1 gives its value as text, and then refuses the whole file, whatever the profile."""
    numbers = re.findall(r"\b(?:count|replicas|retries|cpus|pids_limit): *(\S+)", COMPOSE)
    assert not [value for value in numbers if "$" in value]
    assert re.search(r'device_ids: \["\$\{GPUS:-0\}"\]', COMPOSE)


def test_the_images_are_of_this_version() -> None:
    assert default("VERSION") == __version__


def test_nothing_is_published_beyond_this_machine_by_default() -> None:
    published = re.findall(r"ports: \[\"([^\"]*)\"\]", COMPOSE)
    assert len(published) == 3
    assert all(port.startswith(("127.0.0.1:", "${IDSPAM_HOST:-127.0.0.1}:")) for port in published)


def test_what_the_image_copies_is_not_ignored() -> None:
    allowed = [
        line.removeprefix("!")
        for line in (TREE / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", DOCKERFILE)
    assert copied
    for path in " ".join(copied).split():
        assert path in allowed or str(Path(path).parent) in allowed
        assert (TREE / path).exists()


def test_the_image_runs_as_its_own_user() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.search(r"(?m)^USER idspam$", last)
    assert "HEALTHCHECK" in last
    assert "deploy/alive.py" in last


def test_the_health_check_asks_for_liveness(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        port = live.url.rpartition(":")[2]
        done = script("deploy/alive.py", IDSPAM_PORT=port)
    assert done.returncode == 0
    assert '"status":"ok"' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("host", ["::", "::1", "0.0.0.0", "localhost"])
def test_the_health_check_asks_the_address_that_the_service_listens_on(
    tmp_path: Path, host: str
) -> None:
    with serve(tmp_path, host=host) as live:
        port = live.url.rpartition(":")[2].rstrip("/")
        done = script("deploy/alive.py", IDSPAM_PORT=port, IDSPAM_HOST=host)
    assert done.returncode == 0
    assert '"status":"ok"' in done.stdout


def test_the_health_check_knows_a_service_link_from_a_port() -> None:
    """Port 8000 is the service's default; whoever answers there, no traceback is shown."""
    done = script("deploy/alive.py", IDSPAM_PORT="tcp://10.0.0.1:8000", IDSPAM_HOST="127.0.0.9")
    assert done.returncode == 1
    assert "no answer on port 8000 of 127.0.0.9" in done.stdout
    for port in ("0", "x", "99999"):
        done = script("deploy/alive.py", IDSPAM_PORT=port)
        assert done.returncode == 1
        assert done.stdout.startswith(f"IDSPAM_PORT: '{port}': ")
        assert not done.stderr


def test_a_service_that_does_not_answer_is_unhealthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    done = script("deploy/alive.py", IDSPAM_PORT=port)
    assert done.returncode == 1
    assert f"no answer on port {port}" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("words", "torch", "said"),
    [
        ("nonsense", "", "nonsense: no such set"),
        ("serve int16", "", "int16: no such extra"),
        ("serve", "gpu", "TORCH=gpu: must be cpu"),
    ],
)
def test_an_impossible_environment_is_refused_before_it_is_made(
    words: str, torch: str, said: str, tmp_path: Path
) -> None:
    done = script(".ci/setup.py", str(tmp_path / "venv"), *words.split(), TORCH=torch)
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "venv").exists()
