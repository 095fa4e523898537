"""Fixtures that many tests share. The builders behind them are in tests/support/tiny_models.py."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: it is read when a kernel is declared, its own ones included.
    os.environ["TRITON_INTERPRET"] = "1"

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from tests.support.engine_harness import Opened, open_house
from tests.support.tiny_models import make_adapter, make_backbone

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that; some
# tests are about Ctrl-C.
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
def opened(tmp_path: Path, backbone: Backbone) -> Opened:
    """Opens a real engine over a store of its own; settings by name."""
    return partial(open_house, tmp_path / "store", backbone)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device; everywhere else they are skipped, and the report says
    so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
