"""The page Adapters: the list, one adapter, uploads, and what can go wrong meanwhile."""

import hashlib
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, FilePayload, Page, expect

from adapters.format.files import serialize
from adapters.format.spec import Provenance
from tests.support.browser import Console, drop, open_console
from tests.support.http_service import RunningService, serve
from tests.support.key_files import bearer, revoke, write_keys
from tests.support.service_process import ReadyService
from tests.support.tiny_models import make_adapter, make_backbone

pytestmark = pytest.mark.slow

SCRIPT = "<script>window.hacked = true</script>"
CARD = f"""---
license: "mit"
---

# A card {SCRIPT}

| label | rows |
| --- | ---: |
| `ham` | 12 |

[click](javascript:window.hacked=true) [paper](https://example.org/paper) ![picture](http://example.org/x.png)

<img src=x onerror="window.hacked = true">

- **bold** and *italic*
- a < b &amp; c

```sh
python -m train fit
```
"""


def data(seed: int = 0, **fields: Any) -> bytes:
    return serialize(make_adapter(make_backbone(), seed=seed, **fields))


def revision_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file(name: str, content: bytes) -> FilePayload:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


def choose(page: Page, *files: FilePayload) -> None:
    """Choose files with the file picker."""
    page.get_by_role("region", name="Upload").locator("input[type=file]").set_input_files(files)


def confirm(page: Page, button: str, typed: str | None = None) -> None:
    dialog = page.get_by_role("dialog")
    if typed is not None:
        expect(dialog.get_by_role("button", name=button)).to_be_disabled()
        dialog.get_by_role("textbox").fill(typed)
    dialog.get_by_role("button", name=button).click()


@contextmanager
def opened(
    browser: Browser, live: RunningService, route: str = "#/adapters"
) -> Iterator[tuple[Console, Page]]:
    with open_console(browser, live.url, route=route) as console:
        yield console, console.page


@pytest.fixture
def live(tmp_path: Path) -> Iterator[RunningService]:
    with serve(tmp_path / "adapters") as running:
        yield running


def test_the_list_and_an_adapter_of_the_zoo(browser: Browser, zoo: ReadyService) -> None:
    with open_console(browser, zoo.url, route="#/adapters") as console:
        page = console.page
        expect(page.get_by_text("4 adapters", exact=True)).to_be_visible()
        row = page.get_by_role("row").filter(has_text="banking77")
        expect(row).to_contain_text("ready")
        expect(row).to_contain_text("and 73 more")
        console.look_at("adapters")
        page.get_by_role("link", name="banking77").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("banking77")
        card = page.get_by_role("region", name="Model card", exact=True)
        expect(card).to_contain_text("An adapter for the frozen backbone")
        expect(card.get_by_role("table").first).to_be_visible()
        expect(page.get_by_role("region", name="What it is")).to_contain_text("PolyAI BANKING77")
        expect(page.get_by_role("region", name="Revisions", exact=True)).to_contain_text("served")
        # What the service does not have is said.
        expect(page.get_by_role("region", name="Drift", exact=True)).not_to_contain_text("Reading")
        console.look_at("adapter")


def test_a_link_that_is_pressed_while_the_list_changes_is_followed(
    browser: Browser, zoo: ReadyService
) -> None:
    with open_console(browser, zoo.url, route="#/adapters") as console:
        page = console.page
        page.get_by_role("link", name="sms-spam").hover()
        page.mouse.down()
        # The answer to what was typed comes before the button is released.
        with page.expect_response(re.compile("search=senti")):
            page.get_by_label("Search by name").fill("senti")
        page.wait_for_timeout(100)
        page.mouse.up()
        # Its model card has a heading of that name, too.
        expect(page.get_by_role("heading", level=1)).to_have_text("sms-spam")


def test_a_first_file_is_checked_published_and_told_of(
    browser: Browser, live: RunningService
) -> None:
    with opened(browser, live) as (console, page):
        expect(page.get_by_text("There is no adapter yet")).to_be_visible()
        drop(console, ".drop", "My Task (v2).safetensors", data(1))
        report = page.get_by_role("region", name="The file")
        expect(report).to_contain_text("A valid adapter for this service.")
        expect(report.get_by_label("Serve it under the name")).to_have_value("my-task-v2-")
        # Nothing is stored by looking.
        assert live.client.get("/v1/adapters").json()["total"] == 0
        name = report.get_by_label("Serve it under the name")
        name.fill("My Task")
        report.get_by_role("button", name="Check under this name").click()
        expect(report.get_by_role("alert")).to_contain_text("A name has 1 to 64")
        name.fill("mail")
        report.get_by_role("button", name="Check under this name").click()
        report.get_by_role("button", name="Publish mail").click()
        confirm(page, "Publish")
        expect(page.get_by_role("heading", level=1)).to_have_text("mail")
        expect(page.get_by_role("region", name="Revisions", exact=True)).to_contain_text(
            "published"
        )
        assert live.client.get("/v1/adapters/mail").json()["revision"] == revision_of(data(1))


def test_a_replacement_shows_what_changes_and_is_compared_before_it_answers(
    browser: Browser, live: RunningService
) -> None:
    before = data(1, provenance=Provenance(metrics={"test.accuracy": 0.91}))
    after = data(2, prompt_length=7, provenance=Provenance(metrics={"test.accuracy": 0.94}))
    live.client.put("/v1/adapters/mail", content=before)
    with opened(browser, live, "#/adapters/mail") as (console, page):
        choose(page, file("mail.safetensors", after), file("mail.md", CARD.encode()))
        report = page.get_by_role("region", name="The file")
        changes = report.get_by_role("region", name="What differs")
        expect(changes.get_by_role("row", name="length of the prompt")).to_contain_text("3")
        expect(changes.get_by_role("row", name="test.accuracy")).to_contain_text("+0.03")
        expect(report).to_contain_text("Its model card, mail.md")
        report.get_by_text("Compare its answers first").click()
        report.get_by_role("button", name="Stage the file and compare").click()
        expect(report.get_by_role("alert")).to_contain_text("There is no text yet")
        texts = [f"free win now {index}" for index in range(8)]
        report.get_by_label("Texts, at most 50").fill("\n".join(["", *texts, ""]))
        report.get_by_role("button", name="Stage the file and compare").click()
        answers = report.get_by_role("region", name="Answers of both")
        expect(answers.get_by_role("row")).to_have_count(9)
        console.look_at("upload")
        # The same answers as the API gives.
        served, staged = revision_of(before), revision_of(after)
        inputs = [{"text": texts[0], "adapter": f"mail@{item}"} for item in (served, staged)]
        results = live.predict(inputs=inputs)["results"]
        for result in results:
            expect(answers.get_by_role("row").nth(1)).to_contain_text(f"{result['score']:.3f}")
        assert live.client.get("/v1/adapters/mail").json()["revision"] == served
        report.get_by_role("button", name="Replace").click()
        confirm(page, "Replace")
        expect(page.locator(".toast").filter(has_text="The model card is kept.")).to_be_visible()
        expect(page.locator("h1 ~ code, .row > code").first).to_have_text(staged[:8])
        shown = live.client.get("/v1/adapters/mail").json()
        assert shown["revision"] == staged
        assert [event["what"] for event in shown["events"]] == ["promote", "stage", "publish"]
        assert live.client.get("/v1/adapters/mail/card").text == CARD


def test_a_staged_file_can_be_taken_back(browser: Browser, live: RunningService) -> None:
    live.client.put("/v1/adapters/mail", content=data(1))
    with opened(browser, live, "#/adapters/mail") as (_, page):
        choose(page, file("mail.safetensors", data(2)))
        report = page.get_by_role("region", name="The file")
        report.get_by_text("Compare its answers first").click()
        report.get_by_label("Texts, at most 50").fill("hello")
        report.get_by_role("button", name="Stage the file and compare").click()
        expect(report.get_by_role("region", name="Answers of both")).to_be_visible()
        report.get_by_role("button", name="Close").click()
        confirm(page, "Remove it")
        expect(report).to_have_count(0)
        expect(
            page.get_by_role("region", name="Stored revisions").get_by_role("row")
        ).to_have_count(2)
        assert live.client.get("/v1/adapters/mail").json()["revisions"] == [revision_of(data(1))]


def refused_files() -> dict[str, tuple[bytes, str]]:
    whole = data(3)
    return {
        "text": (b"Dear Sir or Madam", "not a valid adapter"),
        "empty": (b"", "shorter than a safetensors header"),
        "pickle": (b"\x80\x04K\x01.", "a pickle, which can run code"),
        "cut": (whole[:-100], "not a valid adapter"),
        "cut-header": (whole[:300], "truncated inside its header"),
        "other-backbone": (
            serialize(make_adapter(make_backbone(seed=5))),
            "made for another backbone",
        ),
    }


def test_bad_files_are_refused_in_the_words_of_the_service(
    browser: Browser, live: RunningService
) -> None:
    live.client.put("/v1/adapters/mail", content=data(1))
    with opened(browser, live, "#/adapters/mail") as (console, page):
        report = page.get_by_role("region", name="The file")
        for name, (content, words) in refused_files().items():
            choose(page, file(f"{name}.safetensors", content))
            expect(report).to_contain_text(f"{name}.safetensors")
            expect(report.get_by_role("alert")).to_contain_text(words)
            expect(report.get_by_role("button", name=re.compile("Replace|Publish"))).to_have_count(
                0
            )
        # Of an adapter of another backbone it is known what it is.
        expect(report).to_contain_text("tiny-bert-5")
        expect(report.get_by_role("region", name="What differs")).to_contain_text("backbone")
        console.look_at("upload-refused")
        choose(page, file("a.safetensors", data(1)), file("b.safetensors", data(2)))
        expect(page.get_by_role("alert").filter(has_text="One adapter file")).to_be_visible()
        choose(page, file("mail.safetensors", data(1)))
        expect(report).to_contain_text("serves exactly these bytes already")
        report.get_by_role("button", name="Cancel").click()
        expect(report).to_have_count(0)
        assert live.client.get("/v1/adapters/mail").json()["revisions"] == [revision_of(data(1))]


def test_another_meaning_must_be_meant(browser: Browser, live: RunningService) -> None:
    live.client.put("/v1/adapters/mail", content=data(1))
    with opened(browser, live, "#/adapters/mail") as (console, page):
        choose(page, file("mail.safetensors", data(2, labels=("eggs", "ham"))))
        report = page.get_by_role("region", name="The file")
        expect(report).to_contain_text("answers something else than mail does now")
        expect(report).to_contain_text("Labels added: eggs")
        go = report.get_by_role("button", name="Replace")
        expect(go).to_be_disabled()
        console.look_at("upload-other-labels", themes=("light",))
        report.get_by_label("Clients will be told something else").check()
        go.click()
        confirm(page, "Replace")
        expect(page.get_by_role("region", name="What it is")).to_contain_text("eggs")
        assert live.client.get("/v1/adapters/mail").json()["labels"] == ["eggs", "ham"]


def test_a_label_and_a_card_with_markup_are_shown_and_never_run(
    browser: Browser, live: RunningService
) -> None:
    content = data(1, labels=(SCRIPT, "<img src=x onerror=window.hacked=true>"))
    with opened(browser, live) as (console, page):
        choose(page, file("evil.safetensors", content), file("evil.md", CARD.encode()))
        report = page.get_by_role("region", name="The file")
        expect(report.get_by_text(SCRIPT, exact=True).first).to_be_visible()
        report.get_by_text("Its model card, evil.md").click()
        expect(report.locator(".markdown")).to_contain_text(SCRIPT)
        report.get_by_role("button", name="Publish evil").click()
        confirm(page, "Publish")
        card = page.get_by_role("region", name="Model card", exact=True)
        expect(card).to_contain_text('<img src=x onerror="window.hacked = true">')
        expect(card).to_contain_text("a < b & c")
        expect(card.get_by_role("link", name="paper")).to_have_attribute(
            "href", "https://example.org/paper"
        )
        # A link that runs a script is no link, a picture of another server is not fetched.
        expect(card.get_by_role("link")).to_have_count(1)
        expect(card.locator("img, script, iframe")).to_have_count(0)
        expect(card.get_by_role("table")).to_contain_text("ham")
        expect(card.locator("pre").last).to_contain_text("python -m train fit")
        console.look_at("card-with-markup", themes=("light",))
        console.go("#/adapters")
        expect(page.get_by_role("row").filter(has_text=SCRIPT)).to_be_visible()
        assert console.run("() => window.hacked") is None


def test_a_revision_that_was_replaced_meanwhile_is_a_conflict_and_said_to(
    browser: Browser, live: RunningService
) -> None:
    live.client.put("/v1/adapters/mail", content=data(1))
    with opened(browser, live, "#/adapters/mail") as (console, page):
        choose(page, file("mail.safetensors", data(2)))
        report = page.get_by_role("region", name="The file")
        expect(report).to_contain_text("A valid adapter for this service.")
        live.client.put("/v1/adapters/mail", content=data(3))
        report.get_by_role("button", name="Replace").click()
        confirm(page, "Replace")
        conflict = report.get_by_role("alert")
        expect(conflict).to_contain_text("mail was changed since this file was checked")
        expect(conflict).to_contain_text("412 revision_conflict")
        assert live.client.get("/v1/adapters/mail").json()["revision"] == revision_of(data(3))
        console.look_at("conflict", themes=("light",))
        report.get_by_role("button", name="Check against what is served now").click()
        go = report.get_by_role("button", name=f"Replace {revision_of(data(3))[:8]}")
        expect(go).to_be_visible()
        # What the page shows of the adapter is found to be old, too.
        live.client.put("/v1/adapters/mail", content=data(4))
        notice = page.get_by_role("status").filter(has_text="this page shows")
        expect(notice).to_contain_text(
            f"mail serves {revision_of(data(4))[:8]} now", timeout=15_000
        )
        page.get_by_role("button", name="Delete", exact=True).first.click()
        confirm(page, "Delete", typed="mail")
        expect(page.get_by_role("alert").filter(has_text="revision_conflict")).to_be_visible()
        notice.get_by_role("button", name="Show it").click()
        expect(notice).to_have_count(0)
        live.client.delete("/v1/adapters/mail")
        expect(page.get_by_text("mail was deleted meanwhile.")).to_be_visible(timeout=15_000)


def test_revisions_are_compared_served_again_and_deleted(
    browser: Browser, live: RunningService
) -> None:
    contents = [data(seed, prompt_length=seed + 2) for seed in (1, 2, 3)]
    for content in contents:
        live.client.put("/v1/adapters/mail", content=content)
    first, second, third = (revision_of(content)[:8] for content in contents)
    with opened(browser, live, "#/adapters/mail") as (console, page):
        stored = page.get_by_role("region", name="Stored revisions")
        served = stored.get_by_role("row").filter(has=page.locator(".state"))
        expect(stored.get_by_role("row")).to_have_count(4)
        stored.get_by_role("button", name=f"What would change with {first}").click()
        expect(page.get_by_role("row", name="length of the prompt")).to_contain_text("5")
        console.look_at("revisions", themes=("light",))
        with page.expect_download() as download:
            stored.get_by_role("button", name=f"Download {first}").click()
        assert Path(download.value.path()).read_bytes() == contents[0]
        stored.get_by_role("button", name=f"Serve {first}").click()
        confirm(page, "Roll back")
        expect(served).to_contain_text(first)
        page.get_by_role("button", name="Roll back", exact=True).click()
        confirm(page, "Roll back")
        expect(served).to_contain_text(third)
        stored.get_by_role("button", name=f"Delete {second}").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        expect(stored.get_by_role("row")).to_have_count(4)
        stored.get_by_role("button", name=f"Delete {second}").click()
        confirm(page, "Delete")
        expect(stored.get_by_role("row")).to_have_count(3)
        page.get_by_role("button", name="Unload").click()
        confirm(page, "Unload")
        expect(page.locator(".state.unloaded").first).to_be_visible()
        page.get_by_role("button", name="Load", exact=True).click()
        confirm(page, "Load")
        expect(page.locator(".state.ready").first).to_be_visible()
        page.get_by_role("button", name="Delete", exact=True).first.click()
        confirm(page, "Delete", typed="mail")
        expect(page.get_by_text("There is no adapter yet")).to_be_visible()


def test_a_trial_is_started_watched_and_promoted(browser: Browser, live: RunningService) -> None:
    live.client.put("/v1/adapters/mail", content=data(1))
    staged = live.client.put("/v1/adapters/mail", content=data(2), params={"stage": "true"}).json()[
        "revision"
    ]
    with opened(browser, live, "#/adapters/mail") as (console, page):
        traffic = page.get_by_role("region", name="Traffic")
        expect(traffic).to_contain_text("is stored and reads no text")
        traffic.get_by_text("Start a trial, or change it").click()
        traffic.get_by_label("Percent of the texts").fill("100")
        traffic.get_by_text("When it ends by itself").click()
        traffic.get_by_label("at most this share gets another answer").fill("")
        traffic.get_by_role("button", name="Start the trial").click()
        expect(traffic).to_contain_text("reads 100 % of the texts and answers none")
        rule = live.client.get("/v1/adapters/mail/traffic").json()["rule"]
        assert rule["max_disagreement"] is None
        assert rule["max_error_rate"] == 0.02
        live.predict(adapter="mail", inputs=[f"free {index}" for index in range(30)])
        expect(traffic.get_by_role("row", name="the served one answered")).to_contain_text("30")
        expect(traffic).to_contain_text("30 texts compared")
        console.look_at("trial")
        traffic.get_by_label("Percent of the texts").fill("500")
        traffic.get_by_role("button", name="Start the trial").click()
        assert not traffic.get_by_label("Percent of the texts").evaluate("e => e.validity.valid")
        traffic.get_by_role("button", name="Make it the served one").click()
        confirm(page, "Serve it")
        expect(traffic).to_contain_text("has ended: promoted")
        assert live.client.get("/v1/adapters/mail").json()["revision"] == staged


def test_a_key_may_read_and_not_change_and_is_revoked_while_the_page_is_open(
    browser: Browser, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    tokens = write_keys(keys, reader={"scopes": ["adapters:read"]}, writer={})
    with serve(tmp_path / "adapters", KEYS_FILE=str(keys)) as live:
        live.client.put("/v1/adapters/mail", content=data(1), headers=bearer(tokens["writer"]))
        with opened(browser, live, "#/adapters/mail") as (_, page):
            dialog = page.get_by_role("dialog", name="A key is needed")
            dialog.get_by_label("Key").fill(tokens["reader"])
            page.keyboard.press("Enter")
            events = page.get_by_role("region", name="Revisions", exact=True)
            expect(events).to_contain_text("writer published")
            choose(page, file("mail.safetensors", data(2)))
            expect(dialog).to_contain_text("this needs a key with the scope adapters:write")
            dialog.get_by_label("Key").fill(tokens["writer"])
            page.keyboard.press("Enter")
            report = page.get_by_role("region", name="The file")
            expect(report).to_contain_text("A valid adapter")
            revoke(keys, "writer")
            # Found by looking, without a dialog that nobody has asked for.
            expect(page.get_by_text("this key was revoked")).to_be_visible(timeout=15_000)
            expect(dialog).to_have_count(0)
            report.get_by_role("button", name="Replace").click()
            confirm(page, "Replace")
            expect(dialog).to_contain_text("this key was revoked")
            page.keyboard.press("Escape")
            expect(report.get_by_role("alert")).to_contain_text("401 key_revoked")


def test_a_service_that_goes_away_is_waited_for_and_the_page_goes_on(
    browser: Browser, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with serve(tmp_path, PORT=str(port)) as first:
        first.client.put("/v1/adapters/mail", content=data(1))
        opened_ = open_console(browser, url, route="#/adapters/mail")
        console = opened_.__enter__()
        page = console.page
        expect(page.get_by_role("region", name="What it is")).to_be_visible()
        page.clock.install()
    try:
        choose(page, file("mail.safetensors", data(2)))
        expect(page.locator(".banner")).to_contain_text("The service does not answer.")
        report = page.get_by_role("region", name="The file")
        expect(report.get_by_role("alert")).to_contain_text("The service does not answer.")
        # The page looks by itself, too: its clock stands still, so that the button does it.
        page.clock.pause_at(page.evaluate("Date.now()") / 1000 + 1)
        with serve(tmp_path, PORT=str(port)):
            page.locator(".banner").get_by_role("button", name="Try now").click()
            expect(page.locator(".banner")).to_be_hidden()
            report.get_by_role("button", name="Check again").click()
            expect(report).to_contain_text("A valid adapter for this service.")
    finally:
        opened_.__exit__(None, None, None)
