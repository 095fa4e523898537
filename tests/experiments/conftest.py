"""The workspace that all experiments in these tests use."""

from pathlib import Path

import pytest

from tests.support.experiments import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone and four tiny tasks, as `make_workspace` writes it."""
    folder = tmp_path_factory.mktemp("workspace")
    make_workspace(folder)
    return folder
