"""One service with the zoo for all pages, and a browser for each file of tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.service_process import TREE, ReadyService, ready_service

if TYPE_CHECKING:
    # Only here: where playwright is not installed, the files of tests are skipped by name.
    from playwright.sync_api import Browser

    from tests.support.browser import Console

BACKBONE = Path("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadyService]:
    """The service as a stranger starts it, with two workers. No test changes it."""
    folder = tmp_path_factory.mktemp("zoo")
    with ready_service(BACKBONE, folder, ZOO_DIR=str(TREE / "adapters" / "zoo")) as running:
        yield running


# Not of the session: while playwright's blocking API is in use, no async test can run.
@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A browser."""
    from tests.support.browser import chromium

    with chromium() as running:
        yield running


@pytest.fixture
def console(browser: "Browser", zoo: ReadyService) -> "Iterator[Console]":
    """The first page of the console of the zoo."""
    from tests.support.browser import open_console

    with open_console(browser, zoo.url) as opened:
        yield opened
