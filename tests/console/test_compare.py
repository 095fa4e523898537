"""The page Compare: two adapters, or two revisions of one, on the same texts."""

import csv
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.support.browser import Console, downloaded, drop, open_console
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone

pytestmark = pytest.mark.slow

LABELS = ("ham", "spam", "other")
WORDS = ("free", "win", "now", "hello", "good", "bad", "card", "my", "not", "you")
TEXTS = [f"{one} {other} call" for one in WORDS for other in WORDS]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    backbone = make_backbone()
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        running.put("mail", make_adapter(backbone, seed=1, labels=LABELS))
        running.put("mail", make_adapter(backbone, seed=2, labels=LABELS))
        running.put("other", make_adapter(backbone, seed=3, labels=("x", "y")))
        yield running


def revisions(live: RunningService) -> list[str]:
    return list(live.client.get("/v1/adapters/mail").json()["revisions"])


def labels(live: RunningService, reference: str) -> list[str]:
    results = live.predict(adapter=reference, inputs=TEXTS)["results"]
    return [result["label"] for result in results]


def compare(page: Page) -> None:
    page.get_by_role("button", name="Compare", exact=True).click()


def test_two_revisions_disagree_where_the_api_says_so_and_that_comes_first(
    browser: Browser, live: RunningService
) -> None:
    new, old = revisions(live)
    apart = [
        (text, a, b)
        for text, a, b in zip(
            TEXTS, labels(live, f"mail@{new}"), labels(live, f"mail@{old}"), strict=True
        )
        if a != b
    ]
    assert 5 < len(apart) < len(TEXTS) - 5
    with open_console(browser, live.url, route=f"#/compare?a=mail&b=mail@{old[:12]}") as console:
        page = console.page
        expect(page.get_by_label("Revision").nth(1)).to_have_value(old)
        page.get_by_label("Texts, one on each line").fill("\n".join(TEXTS))
        compare(page)
        expect(page.locator(".headline")).to_have_text(
            re.compile(rf"^{len(apart)} of {len(TEXTS)} texts get another answer")
        )
        shown = page.locator(".rows > li")
        expect(shown).to_have_count(min(50, len(apart)))
        assert page.locator(".rows > li.agree").count() == 0
        page.get_by_role("button", name=f"All texts ({len(TEXTS)})").click()
        expect(shown).to_have_count(50)
        page.get_by_role("button", name=re.compile("^Show 50 more")).click()
        expect(shown).to_have_count(100)
        kinds = [item.get_attribute("class") for item in shown.all()]
        assert kinds == ["apart"] * len(apart) + ["agree"] * (len(TEXTS) - len(apart))
        _, made = downloaded(console, "Download all as CSV")
        rows = list(csv.DictReader(io.StringIO(made.decode())))
        a, b = (f"mail@{revision[:8]}.answer" for revision in (new, old))
        found = {(row["text"], row[a], row[b]) for row in rows if row["agree"] == "false"}
        assert found == set(apart)
        # The addresses have what was chosen and no text.
        assert "free" not in page.url


def test_a_replacement_during_a_comparison_changes_nothing_of_it(
    browser: Browser, live: RunningService
) -> None:
    """Both sides are pinned when it begins."""
    with open_console(browser, live.url, route="#/compare?a=mail&b=other") as console:
        page = console.page
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.post_data or ""))
        drop(console, ".drop", "texts.csv", ("text\n" + "\n".join(TEXTS)).encode())
        compare(page)
        expect(page.get_by_text("no label in common")).to_be_visible()
        expect(page.locator(".headline")).to_have_text(re.compile(r"^100 of 100 texts"))
        new = revisions(live)[0]
        bodies = [body for body in sent if body]
        assert bodies
        assert all(f'"mail@{new}"' in body for body in bodies)


def test_what_is_missing_is_said_before_anything_is_asked(
    browser: Browser, live: RunningService
) -> None:
    with open_console(browser, live.url, route="#/compare") as console:
        page = console.page
        compare(page)
        expect(page.get_by_text("Choose two adapters")).to_be_visible()
        for side in ("A", "B"):
            box = page.get_by_role("combobox", name=f"Adapter {side}")
            box.fill("mail")
            box.press("Enter")
            expect(page.get_by_label(f"Chosen: Adapter {side}")).to_contain_text("mail")
        compare(page)
        expect(page.get_by_role("alert").filter(has_text="Paste texts, or drop")).to_be_visible()
        page.get_by_label("Texts, one on each line").fill("free win now\n\n  \nhello")
        compare(page)
        expect(page.locator(".headline")).to_have_text(re.compile("^0 of 2 texts"))


def test_enter_waits_for_the_rows_of_what_is_typed(browser: Browser, live: RunningService) -> None:
    with open_console(browser, live.url, route="#/compare") as console:
        page = console.page

        def slowly(route: Route) -> None:
            time.sleep(0.3)
            route.continue_()

        page.route("**/v1/adapters?*", slowly)
        box = page.get_by_role("combobox", name="Adapter A")
        # The rows of an empty field are there: none of them is meant.
        box.focus()
        expect(page.get_by_role("option").first).to_be_visible()
        box.fill("mail")
        box.press("Enter")
        expect(page.get_by_label("Chosen: Adapter A")).to_contain_text("mail")
        expect(page.get_by_role("listbox")).to_be_hidden()
        expect(box).to_have_value("")


def test_it_looks_well_with_the_zoo(console: Console) -> None:
    page = console.page
    console.go("#/compare?a=sms-spam&b=sentiment")
    page.get_by_label("Texts, one on each line").fill(
        "You have won a prize! Call 0800 123 456 now\nSee you at eight\nThe film was a pleasure"
    )
    console.look_at("compare-before")
    compare(page)
    expect(page.locator(".rows > li")).to_have_count(3)
    console.look_at("compare")


def test_an_adapter_that_has_gone_is_said_for_every_text(browser: Browser, tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        live.put("mail", make_adapter(make_backbone()))
        with open_console(browser, live.url, route="#/compare?a=mail&b=gone") as console:
            console.page.get_by_label("Texts, one on each line").fill("free win now")
            compare(console.page)
            expect(console.page.get_by_text("could not be answered by both")).to_be_visible()
            expect(console.page.get_by_text(re.compile("^line 1: .*gone"))).to_be_visible()
