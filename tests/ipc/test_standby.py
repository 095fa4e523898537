"""The standby: how fast a dead engine is replaced, and what happens when the standby ends."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.service_process import (
    Load,
    ReadyService,
    environ,
    ready_service,
    service_process,
    until,
)
from tests.support.tiny_models import make_adapter

# Each test starts processes, and times them.
pytestmark = [pytest.mark.slow, pytest.mark.alone]

# What the issue of down time allows on a CPU.
DOWN_SECONDS = 3.0
# Five seconds of silence, and what the machine adds.
HANG_SECONDS = 12.0


@pytest.fixture(scope="module")
def adapter_file(folder: Path) -> bytes:
    return serialize(make_adapter(load_backbone(str(folder), device="cpu"), seed=1))


@pytest.fixture(scope="module")
def service(
    folder: Path, adapter_file: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReadyService]:
    """Shared: every test leaves it ready."""
    with ready_service(folder, tmp_path_factory.mktemp("s")) as running:
        httpx.put(f"{running.url}/v1/adapters/a", content=adapter_file).raise_for_status()
        yield running


def replaced(service: ReadyService, name: str, ended: int) -> bool:
    return service.children().get(name, ended) != ended


def answered_again(load: Load) -> bool:
    return bool(load.answers) and load.answers[-1][1] == 200


def test_a_killed_engine_is_replaced_within_three_seconds_under_load(
    service: ReadyService,
) -> None:
    down = []
    with Load(service.url, "a") as load:
        until(lambda: len(load.answers) > 50)
        for _ in range(3):
            began, seen = time.monotonic(), len(load.answers)
            killed = service.kill("engine")
            until(lambda seen=seen: 503 in {item[1] for item in load.answers[seen:]})  # type: ignore[misc]  # bound now
            until(lambda: answered_again(load))
            down.append(time.monotonic() - began)
            assert replaced(service, "engine", killed)
            time.sleep(0.5)
    assert load.errors == []
    assert load.statuses() == {200, 503}
    # Of three, because others may be using this machine.
    assert min(down) < DOWN_SECONDS, down


def test_a_killed_standby_is_replaced_while_the_engine_goes_on(service: ReadyService) -> None:
    before = service.children()
    with Load(service.url, "a") as load:
        until(lambda: len(load.answers) > 20)
        service.kill("standby")
        until(lambda: replaced(service, "standby", before["standby"]))
        assert service.children()["engine"] == before["engine"]
        # Needed while there is no standby yet: the engine waits for it.
        killed = service.kill("engine")
        until(lambda: replaced(service, "engine", killed) and answered_again(load))
    assert load.errors == []


@pytest.mark.parametrize("names", [("engine", "worker-0"), ("standby",)])
def test_stopped_processes_are_killed_and_replaced(
    service: ReadyService, names: tuple[str, ...]
) -> None:
    before = service.children()
    began = time.monotonic()
    for name in names:
        os.kill(before[name], signal.SIGSTOP)
    for name in names:
        until(lambda name=name: replaced(service, name, before[name]))  # type: ignore[misc]  # bound now
    assert time.monotonic() - began < HANG_SECONDS
    after = service.children()
    assert {name for name in after if after[name] != before[name]} == set(names)
    with service.clients(2) as clients:
        for client in clients:
            until(lambda client=client: client.get("/readyz").status_code == 200)  # type: ignore[misc]  # bound now
    assert "hung: no sign of life for 5 seconds" in service.log.read_text()


def test_a_process_that_was_stopped_for_a_moment_goes_on(service: ReadyService) -> None:
    before = service.children()
    for pid in before.values():
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5)
    for pid in before.values():
        os.kill(pid, signal.SIGCONT)
    with Load(service.url, "a") as load:
        until(lambda: answered_again(load))
    assert service.children() == before


def test_without_a_standby_an_engine_is_started_from_nothing(
    folder: Path, adapter_file: bytes, tmp_path: Path
) -> None:
    with ready_service(folder, tmp_path, workers=1, STANDBY="no") as running:
        assert set(running.children()) == {"engine", "worker-0"}
        httpx.put(f"{running.url}/v1/adapters/a", content=adapter_file).raise_for_status()
        with Load(running.url, "a") as load:
            until(lambda: answered_again(load))
            killed = running.kill("engine")
            until(lambda: replaced(running, "engine", killed))
            seen = len(load.answers)
            until(lambda: len(load.answers) > seen and answered_again(load))
        assert load.errors == []


def test_a_backbone_that_cannot_be_loaded_stops_the_start_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    environment = environ(tmp_path / "empty", tmp_path / "adapters", WORKERS="1", STANDBY="yes")
    with service_process(environment) as running:
        output, errors = running.communicate(timeout=60)
    assert (running.returncode, output) == (2, "")
    assert errors.splitlines()[-1].startswith(
        "service: IDSPAM_BACKBONE: cannot load the config of the backbone"
    )


def test_two_engines_without_a_standby_that_cannot_start_say_so_without_a_traceback(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    environment = environ(
        tmp_path / "empty", tmp_path / "adapters", WORKERS="1", STANDBY="no", DEVICE="cpu,cpu"
    )
    with service_process(environment) as running:
        output, errors = running.communicate(timeout=60)
    assert (running.returncode, output) == (2, "")
    assert errors.splitlines()[-1].startswith(
        "service: IDSPAM_BACKBONE: cannot load the config of the backbone"
    )
    assert "never retrieved" not in errors
