"""Fixtures that many tests share, and what is skipped where. The builders are in tests/support/."""

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# Before torch is imported, and for the processes that tests start, too. A thread that waits for
# others gives its core away instead of spinning: where processes with two threads each share two
# cores, spinning takes most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: it reads this when a kernel is declared, its own included.
    os.environ["TRITON_INTERPRET"] = "1"

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from tests.support import engine_harness
from tests.support.tiny_models import make_adapter, make_backbone
from tests.support.unavailable import IN_CI

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.support.triton_interpreter import speed_up

    speed_up()

# Whether this process is one of several that run files of tests side by side.
SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ

pytest_plugins = ["tests.support.machine"]

# xdist tells its workers how wide the terminal is; the commands that tests start have their own.
os.environ.pop("COLUMNS", None)

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that; some tests
# are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of async tests."""
    return "asyncio"


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """A tiny random BERT with a real fast tokenizer. Shared: never cast or moved."""
    return make_backbone()


@pytest.fixture(scope="session")
def adapter(backbone: Backbone) -> Adapter:
    """One adapter of that backbone."""
    return make_adapter(backbone)


@pytest.fixture
def open_engine(tmp_path: Path, backbone: Backbone) -> engine_harness.OpenEngine:
    """Starts a real engine over a store of its own; takes engine settings by name."""
    return partial(engine_harness.open_engine, tmp_path / "store", backbone)


class TestFile(pytest.Module):
    """A file of tests, skipped where a package that it imports is not installed (but not in CI)."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            name = getattr(error.__cause__, "name", None) or ""
            package = name.partition(".")[0]
            if IN_CI or not package or find_spec(package) is not None:
                raise
        pytest.skip(f"{self.nodeid}: {package} is not installed")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> TestFile:
    return TestFile.from_parent(parent, path=module_path)


def pytest_collection_finish() -> None:
    """Tests that look for garbage look through what they made, not through torch and all tests."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device, skip the tests that are marked `gpu`.

    Side by side, files with many slow tests begin first: a long one that begins last is waited for.
    Those that need the machine alone begin last: then they wait for short tests, not for long ones.
    """
    if SIDE_BY_SIDE:
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        alone = {item.path for item in items if item.get_closest_marker("alone")}
        items.sort(key=lambda item: (item.path in alone, -slow[item.path]))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
