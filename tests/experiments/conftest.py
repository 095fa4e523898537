"""The workspace that all experiments in these tests use, and workers that start fast."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.experiments import make_workspace, warm_workers


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone and four tiny tasks, as `make_workspace` writes it."""
    folder = tmp_path_factory.mktemp("workspace")
    make_workspace(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _warm_workers() -> Iterator[None]:
    with warm_workers():
        yield
