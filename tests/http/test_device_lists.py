"""`IDSPAM_DEVICE` with one device and with several: what it may say, and which they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service import auto_workers, devices
from service.auto_workers import workers_of
from service.devices import device_list, devices_of, own_device
from service.settings import InvalidSettings, read_settings
from tests.support.service_process import TREE, environ


@pytest.mark.parametrize(
    ("value", "normal"),
    [
        (" Auto ", "auto"),
        ("cpu", "cpu"),
        ("cuda", "cuda"),
        ("cuda:all", "cuda:all"),
        ("CUDA:0, cuda:10", "cuda:0,cuda:10"),
        ("cpu,cpu,cpu", "cpu,cpu,cpu"),
    ],
)
def test_a_device_or_a_list_is_taken(value: str, normal: str) -> None:
    assert device_list(value) == normal
    assert read_settings({"IDSPAM_DEVICE": value}).devices == tuple(normal.split(","))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("", "must be auto"),
        ("gpu", "must be auto"),
        ("cuda:", "must be auto"),
        ("cuda:01", "must be auto"),
        ("cuda:-1", "must be auto"),
        ("cuda:1000", "must be auto"),
        ("mps", "must be auto"),
        ("cuda:0,cuda:0", "cuda:0 is there twice"),
        ("cuda:0,", "a list is of GPUs"),
        ("cpu,cuda:0", "a list is of GPUs"),
        ("cuda,cuda:1", "a list is of GPUs"),
        ("auto,auto", "a list is of GPUs"),
        ("cuda:all,cuda:1", "a list is of GPUs"),
        (",".join(["cpu"] * 17), "at most 16"),
    ],
)
def test_anything_else_is_refused_by_name(value: str, why: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        read_settings({"IDSPAM_DEVICE": value})
    (fault,) = refused.value.faults
    assert fault.startswith("IDSPAM_DEVICE: ")
    assert why in fault


def test_a_list_needs_workers_and_no_shared_store(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="IDSPAM_WORKERS: 0: must be 1 or more"):
        read_settings({"IDSPAM_DEVICE": "cpu,cpu", "IDSPAM_WORKERS": "0"})
    shared = {"IDSPAM_DEVICE": "cpu,cpu", "IDSPAM_ADAPTER_STORE": str(tmp_path)}
    with pytest.raises(InvalidSettings, match="start a replica for each device"):
        read_settings(shared)


@pytest.mark.parametrize(
    ("device", "cores", "workers"),
    [
        ("cpu,cpu", 2, 2),
        ("cuda:0,cuda:1", 32, 24),
        ("cuda:0,cuda:1", 16, 12),
        ("cuda:0,cuda:1", 64, 24),
        ("cuda:0,cuda:1", 1, 1),
    ],
)
def test_auto_gives_a_list_workers(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(auto_workers, "_has_gpu", lambda: False)
    assert workers_of(None, device) == workers


def test_all_gpus_are_those_that_torch_will_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda: 3)
    assert devices_of("cuda:all") == ("cuda:0", "cuda:1", "cuda:2")
    monkeypatch.setattr(devices, "visible_gpus", lambda: 0)
    with pytest.raises(ValueError, match="there is no GPU"):
        devices_of("cuda:all")
    monkeypatch.setattr(devices, "visible_gpus", lambda: 17)
    with pytest.raises(ValueError, match="17 GPUs"):
        devices_of("cuda:all")


@pytest.mark.parametrize(
    ("visible", "device", "engines", "name", "after"),
    [
        (None, "cuda:1", 2, "cuda:0", "1"),
        ("4,6", "cuda:1", 2, "cuda:0", "6"),
        ("4,6", "cuda:1", 1, "cuda:1", "4,6"),
        # More than there are: the engine says so, by the name that the setting has.
        ("4,6", "cuda:5", 2, "cuda:5", "4,6"),
        (None, "cpu", 2, "cpu", None),
    ],
)
def test_an_engine_sees_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    device: str,
    engines: int,
    name: str,
    after: str | None,
) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda: 2)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr(os, "environ", environment)
    assert own_device(device, engines) == name
    assert environment.get("CUDA_VISIBLE_DEVICES") == after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"DEVICE": "cuda:all"}, "IDSPAM_DEVICE: cuda:all: there is no GPU"),
        ({"DEVICE": "cpu,cpu", "WORKERS": "0"}, "IDSPAM_WORKERS: 0: must be 1 or more"),
    ],
)
def test_the_start_stops_with_one_line(tmp_path: Path, settings: dict[str, str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        env=environ(tmp_path, tmp_path / "a", **settings) | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=TREE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
