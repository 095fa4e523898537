"""The console of a service with ten thousand adapters: it asks for pages of them."""

import re
import time
from collections.abc import Iterator
from hashlib import sha256

import pytest
from playwright.sync_api import Browser, expect

from adapters.format.files import serialize
from tests.support.browser import open_console
from tests.support.http_service import serve
from tests.support.tiny_models import make_adapter, make_backbone

pytestmark = pytest.mark.slow

START_SECONDS = 90


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
        deadline = time.monotonic() + START_SECONDS
        while live.client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield live.url


def test_ten_thousand_adapters_are_paged_and_searched_by_the_service(
    browser: Browser, many_adapters: str
) -> None:
    with open_console(browser, many_adapters, route="#/adapters") as console:
        page = console.page
        expect(page.get_by_text("1 to 50 of 10,000 adapters")).to_be_visible()
        assert page.get_by_role("row").count() == 51
        page.get_by_role("button", name="Next").click()
        expect(page.get_by_text("51 to 100 of 10,000 adapters")).to_be_visible()
        page.get_by_role("button", name="Back").click()
        expect(page.get_by_text("1 to 50 of 10,000 adapters")).to_be_visible()
        console.look_at("adapters-many")
        search = page.get_by_role("searchbox", name="Search by name")
        began = time.monotonic()
        search.fill("task 777")
        expect(
            page.get_by_text("1 to 19 of 19 adapters").or_(page.get_by_text("19 adapters"))
        ).to_be_visible()
        assert time.monotonic() - began < 5
        expect(page.get_by_role("link", name="task-00777")).to_be_visible()
        assert "search=task+777" in page.url
        search.fill("no such thing")
        expect(page.get_by_text("No adapter is like this.")).to_be_visible()
        page.reload()
        expect(search).to_have_value("no such thing")


def test_ten_thousand_adapters_are_searched_and_never_loaded_at_once(
    browser: Browser, many_adapters: str
) -> None:
    with open_console(browser, many_adapters) as console:
        page = console.page
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        box = page.get_by_role("combobox", name="Adapters")
        expect(page.get_by_label("Chosen: Adapters")).to_contain_text("task-00000")
        box.click()
        options = page.get_by_role("option")
        expect(options).to_have_count(50)
        expect(page.get_by_text("the first 50")).to_be_visible()
        page.get_by_role("listbox").evaluate("list => (list.scrollTop = list.scrollHeight)")
        expect(options).to_have_count(100)
        began = time.monotonic()
        box.fill("9876")
        expect(options).to_have_count(1)
        assert time.monotonic() - began < 2
        expect(options).to_contain_text("task-09876")
        box.press("ArrowDown")
        expect(box).to_have_attribute("aria-activedescendant", re.compile(".+-0"))
        console.look_at("try-many", themes=("dark",))
        box.press("Enter")
        expect(page.get_by_label("Chosen: Adapters")).to_contain_text("task-09876")
        box.fill("no-such")
        expect(options).to_have_text(["Use exactly no-such"])
        assert not [url for url in asked if "limit=1000" in url]
        box.press("Escape")
        page.get_by_role("radio", name="nothing").check(force=True)
        page.get_by_label("Text", exact=True).fill("free win now")
        page.get_by_role("button", name="Classify").click()
        expect(page.get_by_role("article")).to_have_count(2)
