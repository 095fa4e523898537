"""One service with the zoo for all pages, and a browser for each file of tests."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

import pytest

from adapters.format.files import serialize
from tests.support.http_service import serve
from tests.support.service_process import TREE, ReadyService, ready_service
from tests.support.tiny_models import make_adapter, make_backbone

if TYPE_CHECKING:
    # Only here: where playwright is not installed, the files of tests are skipped by name.
    from playwright.sync_api import Browser

    from tests.support.browser import Console

BACKBONE = Path("all-MiniLM-L6-v2")
START_SECONDS = 90


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


# Of a module, not of the session: a service in this process changes how its threads take turns.
@pytest.fixture(scope="module")
def many_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with ten thousand adapters: task-00000 to task-09999."""
    store = tmp_path_factory.mktemp("many")
    data = serialize(make_adapter(make_backbone(), labels=("ham", "spam", "other")))
    revision = sha256(data).hexdigest()
    file = store / ".file"
    file.write_bytes(data)
    for number in range(10_000):
        # As the store writes it, without waiting for the disk each time.
        folder = store / f"task-{number:05d}"
        folder.mkdir()
        (folder / f"{revision}.safetensors").hardlink_to(file)
        (folder / "current").write_text(f"{revision}\n")
    with serve(store, wait=False) as live:
        # Every file is read and checked, which takes longer than a start should in other tests.
        deadline = monotonic() + START_SECONDS
        while live.client.get("/readyz").status_code != 200:
            assert monotonic() < deadline
            sleep(0.1)
        yield live.url
