"""How many processes `IDSPAM_WORKERS=auto` starts."""

import os
import subprocess
import sys

import pytest

from service import auto_workers
from service.auto_workers import workers_of
from service.settings import read_settings


def on(monkeypatch: pytest.MonkeyPatch, *, cores: int, gpu: bool = False) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(auto_workers, "_has_gpu", lambda: gpu)


def test_it_is_the_default_and_a_number_is_taken_as_it_is() -> None:
    assert read_settings({}).workers is None
    assert read_settings({"IDSPAM_WORKERS": " Auto "}).workers is None
    assert read_settings({"IDSPAM_WORKERS": "5"}).workers == 5
    assert workers_of(5, "cuda") == 5
    assert workers_of(0, "cuda") == 0


@pytest.mark.parametrize(
    ("device", "gpu", "cores", "workers"),
    [
        ("cpu", True, 16, 0),
        ("auto", False, 16, 0),
        ("auto", True, 16, 12),
        ("cuda:1", False, 8, 6),
        ("cuda", True, 64, 12),
        ("cuda", True, 4, 3),
        ("cuda", True, 3, 0),
    ],
)
def test_a_gpu_gets_three_quarters_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, gpu: bool, cores: int, workers: int
) -> None:
    on(monkeypatch, cores=cores, gpu=gpu)
    assert workers_of(None, device) == workers


def test_it_is_decided_without_torch() -> None:
    code = (
        "import sys; import service.auto_workers as a; a._has_gpu(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
