"""Fixtures that many tests share. The builders behind them are in tests/tiny.py."""

import pytest
import torch

from adapters.adapter import Adapter
from adapters.backbone import Backbone
from tests.tiny import make_adapter, make_backbone


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """A tiny random BERT with a real fast tokenizer. Shared: never cast or moved."""
    return make_backbone()


@pytest.fixture(scope="session")
def adapter(backbone: Backbone) -> Adapter:
    """One adapter of that backbone."""
    return make_adapter(backbone)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device; everywhere else they are skipped, and the report says
    so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
