"""The backbone of the services that run as processes."""

from pathlib import Path

import pytest

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone
from tests.support.tiny_models import save_backbone


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a tiny random backbone. Tests only read it."""
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def saved(folder: Path) -> Backbone:
    """The backbone in `folder`."""
    return load_backbone(str(folder), device="cpu")
