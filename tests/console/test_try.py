"""The page Try: texts, pairs, explanations, limits, and files in and out."""

import csv
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from adapters.format.spec import Calibration, Decision
from tests.support.browser import Console, downloaded, drop, open_console
from tests.support.http_service import Brake, serve
from tests.support.service_process import TREE, ReadyService
from tests.support.tiny_models import make_adapter, make_backbone

pytestmark = pytest.mark.slow

SPAM = "Free ringtone! Reply YES to claim it today"
SCRIPT = '<script>document.title="stolen"</script><img src=x onerror=alert(1)>'


def text_of(page: Page) -> Locator:
    return page.get_by_label("Text", exact=True)


def classify(page: Page, text: str) -> None:
    text_of(page).fill(text)
    page.get_by_role("button", name="Classify").click()


def card(page: Page, adapter: str) -> Locator:
    return page.get_by_role("article", name=re.compile(f"^{re.escape(adapter)}:"))


def choose_only(page: Page, *names: str) -> None:
    chosen = page.get_by_label("Chosen: Adapters")
    expect(chosen).to_be_visible()
    while page.get_by_role("button", name=re.compile("^Remove ")).count():
        page.get_by_role("button", name=re.compile("^Remove ")).first.click()
    box = page.get_by_role("combobox", name="Adapters")
    for name in names:
        box.fill(name)
        option = page.get_by_role("option", name=re.compile(f"^{re.escape(name)}"))
        option.first.click()
        expect(chosen.get_by_role("button", name=f"Remove {name}", exact=True)).to_be_visible()
    box.press("Escape")


def labelled(page: Page, texts: str) -> Locator:
    card = page.get_by_role("region", name="Label a file")
    return card.get_by_text(re.compile(f"^{texts} labelled in"))


def asked(zoo: ReadyService, **body: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{zoo.url}/v1/predict", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["results"])


def test_one_text_goes_through_all_adapters_and_shows_what_the_api_says(
    console: Console, zoo: ReadyService
) -> None:
    page = console.page
    # Four adapters: all of them are chosen, without a click.
    expect(page.get_by_label("Chosen: Adapters").get_by_role("listitem")).to_have_count(4)
    classify(page, SPAM)
    expect(page.get_by_role("article")).to_have_count(4)
    for name in ("banking77", "clinc150", "sentiment", "sms-spam"):
        (result,) = asked(zoo, adapter=name, inputs=SPAM)
        shown = card(page, name)
        expect(shown.locator(".verdict")).to_contain_text(result["label"])
        figures = shown.locator("td.figure").all_inner_texts()
        expected = [f"{item['score']:.3f}" for item in result["scores"][:5]]
        assert [float(figure) for figure in figures] == pytest.approx(
            [float(figure) for figure in expected], abs=0.0011
        )
    expect(page.locator(".results")).to_contain_text("Answered in")
    console.look_at("try")
    many = card(page, "banking77")
    many.get_by_role("button", name="All 77 labels").click()
    expect(many.locator("tbody tr")).to_have_count(77)
    many.get_by_role("button", name="Fewer labels").click()
    expect(many.locator("tbody tr")).to_have_count(5)


def test_rows_stay_while_one_is_pressed(console: Console) -> None:
    page = console.page
    choose_only(page)
    page.get_by_role("combobox", name="Adapters").click()
    options = page.get_by_role("option")
    expect(options).to_have_count(4)
    options.filter(has_text="sms-spam").hover()
    page.mouse.down()
    # The answer to what was typed comes before the button is released.
    with page.expect_response(re.compile("search=spam")):
        page.get_by_role("combobox", name="Adapters").fill("spam")
    page.wait_for_timeout(100)
    expect(options).to_have_count(4)
    page.mouse.up()
    chosen = page.get_by_label("Chosen: Adapters")
    expect(chosen.get_by_role("listitem")).to_have_count(1)
    expect(chosen).to_contain_text("sms-spam")


def test_the_words_of_an_explanation_are_marked_where_they_are(
    console: Console, zoo: ReadyService
) -> None:
    page = console.page
    choose_only(page, "sms-spam")
    # Characters beyond 16 bits: offsets count code points, JavaScript's strings do not.
    text = "🎉🎉 WINNER! Claim your prize \U0001d48f\U0001d490\U0001d498, naïve friend"
    for kind, title in (("attention", "attention"), ("occlusion", "occlusion")):
        page.get_by_role("radio", name=title).check(force=True)
        classify(page, text)
        (result,) = asked(zoo, adapter="sms-spam", inputs=text, explain=kind)
        words = result["explanation"]["words"]
        marks = card(page, "sms-spam").locator("mark")
        expect(marks).to_have_count(len(words))
        expect(card(page, "sms-spam").locator(".explained")).to_have_text(text)
        points = list(text)
        assert marks.all_inner_texts() == [
            "".join(points[word["start"] : word["end"]]) for word in words
        ]
        unknown = [word["word"] for word in words if word["unknown"]]
        assert len(card(page, "sms-spam").locator("mark.unknown").all()) == len(unknown)
        console.look_at(f"try-{kind}", themes=("light",))
    page.get_by_role("radio", name="nothing").check(force=True)
    classify(page, text)
    expect(card(page, "sms-spam").locator("mark")).to_have_count(0)


def test_a_long_text_shows_what_was_not_read(console: Console) -> None:
    page = console.page
    choose_only(page, "sms-spam")
    text = "Free entry in a weekly competition. " * 200
    classify(page, text.strip())
    shown = card(page, "sms-spam")
    expect(shown).to_contain_text("Cut off.")
    expect(shown).to_contain_text(re.compile(r"has read [\d,]+ of the 7,199 characters"))
    unread = shown.locator(".unread").inner_text()
    assert unread.endswith("more characters")
    console.look_at("try-truncated", themes=("light",))


def test_a_pair_and_its_request_as_code_that_runs(console: Console, zoo: ReadyService) -> None:
    page = console.page
    choose_only(page, "sms-spam")
    page.get_by_label("a pair of texts").check()
    page.get_by_label("Second text").fill('It\'s "here" \\ and\nthere')
    classify(page, "O'Neill: is it?")
    expect(card(page, "sms-spam")).to_be_visible()
    page.get_by_text("This request as code").click()
    panel = page.get_by_role("tabpanel")
    command = panel.inner_text()
    done = subprocess.run(
        ["bash", "-c", f"{command} -s"], capture_output=True, text=True, check=True, timeout=30
    )
    (first,) = json.loads(done.stdout)["results"]
    page.get_by_role("tab", name="Python").click()
    code = panel.inner_text()
    program = [sys.executable, "-c", code]
    printed = subprocess.run(
        program, capture_output=True, text=True, check=True, timeout=60, cwd=TREE
    ).stdout
    assert printed.split()[:2] == ["sms-spam", first["label"]]
    expect(card(page, "sms-spam").locator(".verdict")).to_contain_text(first["label"])
    # Several adapters, on the clipboard.
    choose_only(page, "sms-spam", "sentiment")
    console.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=zoo.url)
    page.get_by_role("button", name="Copy", exact=True).click()
    copied = console.run("() => navigator.clipboard.readText()")
    program = [sys.executable, "-c", copied]
    printed = subprocess.run(
        program, capture_output=True, text=True, check=True, timeout=60, cwd=TREE
    ).stdout
    assert [line.split()[0] for line in printed.splitlines()] == ["sms-spam", "sentiment"]


def test_eight_megabytes_pasted_do_not_freeze_the_page_and_can_become_a_file(
    console: Console, zoo: ReadyService
) -> None:
    page = console.page
    choose_only(page, "sms-spam")
    console.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=zoo.url)
    console.run(
        "() => navigator.clipboard.writeText('see you at eight then, my friend\\n'.repeat(254_200))"
    )
    text_of(page).focus()
    began = time.monotonic()
    page.keyboard.press("Control+V")
    notice = page.get_by_role("alert").filter(has_text="8,388,600 characters")
    expect(notice).to_contain_text("The field takes 100,000")
    assert console.run("() => new Promise(done => requestAnimationFrame(() => done(1)))") == 1
    assert time.monotonic() - began < 5
    expect(text_of(page)).to_have_value("")
    console.look_at("try-too-long", themes=("light",))
    notice.get_by_role("button", name="Label its lines as a file").click()
    expect(page.get_by_text("pasted.txt")).to_be_visible()
    page.get_by_role("button", name="Label this file").click()
    expect(page.get_by_text(re.compile(r"^[\d,]+ texts, [\d,]+ a second"))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(
        page.get_by_role("region", name="Label a file").get_by_text(re.compile("^Cancelled after"))
    ).to_be_visible()
    name, content = downloaded(console, "Download pasted-labelled-part.csv")
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert name == "pasted-labelled-part.csv"
    assert rows[0]["text"] == "see you at eight then, my friend"
    assert {row["sms-spam.label"] for row in rows} == {"ham"}


def test_a_table_is_labelled_with_every_column_that_it_had(
    console: Console, zoo: ReadyService
) -> None:
    page = console.page
    choose_only(page, "sms-spam", "sentiment")
    texts = [f"Free entry number {number}, call now" for number in range(150)]
    texts[3] = 'a "quoted" text,\nof two lines'
    table = io.StringIO()
    csv.writer(table).writerows([["id", "message"], *([str(i), t] for i, t in enumerate(texts))])
    content = "\ufeff" + table.getvalue() + "151,too,many\n"
    drop(console, ".drop", "mails.csv", content.encode())
    expect(page.get_by_label("Column of the texts")).to_have_value("message")
    console.look_at("try-file", themes=("light",))
    page.get_by_role("button", name="Label this file").click()
    expect(labelled(page, "151 texts")).to_be_visible(timeout=60_000)
    expect(page.get_by_text("this row has 3 cells, the first row has 2").first).to_be_visible()
    console.look_at("try-labelled")
    name, made = downloaded(console, "Download mails-labelled.csv")
    assert name == "mails-labelled.csv"
    rows = list(csv.DictReader(io.StringIO(made.decode())))
    assert [row["message"] for row in rows[:150]] == texts
    assert [row["id"] for row in rows] == [*(str(number) for number in range(150)), "151"]
    assert "this row has 3 cells" in rows[150]["sms-spam.error"]
    for adapter in ("sms-spam", "sentiment"):
        results = asked(zoo, adapter=adapter, inputs=texts)
        assert [row[f"{adapter}.label"] for row in rows[:150]] == [r["label"] for r in results]
        scores = [float(row[f"{adapter}.score"]) for row in rows[:150]]
        assert scores == pytest.approx([result["score"] for result in results], abs=1e-4)
        assert {row[f"{adapter}.revision"] for row in rows[:150]} == {results[0]["revision"]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("image.png", b"\x89PNG", "a file of texts ends in .txt, .csv, .tsv or .jsonl"),
        ("noname", b"x", "a file of texts ends in"),
        ("latin.txt", b"caf\xe9 au lait\n", "not text in UTF-8"),
        ("empty.txt", b"", "no texts in this file"),
        ("blank.jsonl", b"\n  \n", "no texts in this file"),
        ("empty.csv", b"", "this file is empty"),
        ("open.csv", b'text\n"never closed\n', "a quote that is never closed"),
        ("broken.txt.gz", b"no gzip", "not a whole gzip file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(
    console: Console, name: str, content: bytes, said: str
) -> None:
    drop(console, ".drop", name, content)
    expect(console.page.get_by_role("alert").filter(has_text=said)).to_contain_text(name)


def test_json_lines_keep_their_fields_and_bad_lines_their_place(console: Console) -> None:
    page = console.page
    choose_only(page, "sms-spam")
    lines = [{"id": 7, "text": SPAM, "label": "mine"}, {"id": 8}, "see you at eight"]
    content = "".join(f"{json.dumps(line)}\n" for line in lines) + "{not json\n"
    drop(console, ".drop", "mails.jsonl", content.encode())
    page.get_by_role("button", name="Label this file").click()
    expect(labelled(page, "4 texts")).to_be_visible()
    _, made = downloaded(console, "Download mails-labelled.jsonl")
    answers = [json.loads(line) for line in made.decode().splitlines()]
    assert answers[0]["id"] == 7
    assert answers[0]["label"] == "mine"
    assert answers[0]["predictions"]["sms-spam"]["label"] == "spam"
    assert "no text in" in answers[1]["predictions"]["sms-spam"]["error"]["message"]
    assert answers[2]["text"] == "see you at eight"
    assert answers[2]["predictions"]["sms-spam"]["label"] == "ham"
    assert "not JSON" in answers[3]["predictions"]["sms-spam"]["error"]["message"]


def test_labels_with_markup_abstaining_and_sets_of_labels_are_shown_as_they_are(
    browser: Browser, tmp_path: Path
) -> None:
    backbone = make_backbone()
    with serve(tmp_path) as live:
        live.put("evil", make_adapter(backbone, labels=(SCRIPT, "fine")))
        live.put("sets", make_adapter(backbone, labels=("a", "b", "c"), activation="sigmoid",
                                      thresholds=(0.01, 0.99, 0.5)))  # fmt: skip
        live.put("unsure", make_adapter(backbone, decision=Decision(abstain_below=0.999),
                                        calibration=Calibration(temperature=50.0)))  # fmt: skip
        with open_console(browser, live.url) as console:
            page = console.page
            expect(page.get_by_label("Chosen: Adapters").get_by_role("listitem")).to_have_count(3)
            page.get_by_role("radio", name="nothing").check(force=True)
            classify(page, SCRIPT)
            expect(card(page, "evil")).to_contain_text(SCRIPT)
            expect(card(page, "unsure").locator(".verdict")).to_contain_text("abstains")
            expect(card(page, "unsure").locator(".verdict")).to_contain_text("0.999 is needed")
            sets = live.predict(adapter="sets", inputs=SCRIPT)["results"][0]["labels"]
            tags = card(page, "sets").locator(".tag").all_inner_texts()
            assert tags == sets
            needles = card(page, "sets").locator(".needle")
            assert sorted(item.get_attribute("title") or "" for item in needles.all()) == [
                "needs 0.010", "needs 0.500", "needs 0.990"]  # fmt: skip
            expect(page).to_have_title("Try · ID-SPAM")
            assert page.locator("main script, main img").count() == 0
            console.look_at("try-labels")
            drop(console, ".drop", "x.txt", SCRIPT.encode())
            page.get_by_role("button", name="Label this file").click()
            expect(labelled(page, "1 text")).to_be_visible()
            expect(page).to_have_title("Try · ID-SPAM")


def test_a_revision_that_is_replaced_while_the_page_is_open_is_said(
    browser: Browser, tmp_path: Path
) -> None:
    backbone = make_backbone()
    unsure, flat = Decision(abstain_below=0.999), Calibration(temperature=50.0)
    with serve(tmp_path) as live:
        live.put("mail", make_adapter(backbone, seed=1, decision=unsure, calibration=flat))
        with open_console(browser, live.url) as console:
            page = console.page
            expect(page.get_by_label("Chosen: Adapters")).to_contain_text("mail")
            page.get_by_role("radio", name="nothing").check(force=True)
            classify(page, "free win now")
            expect(card(page, "mail").locator(".verdict")).to_contain_text("abstains")
            second = live.put("mail", make_adapter(backbone, seed=2))
            classify(page, "free win now")
            expect(page.get_by_text("Another revision answers than before")).to_contain_text(
                second[:8]
            )
            # Its own threshold, and not the old one's.
            expect(card(page, "mail").locator(".verdict")).not_to_contain_text("abstains")
            expect(card(page, "mail").locator(".needle")).to_have_count(0)
            live.client.delete("/v1/adapters/mail")
            classify(page, "free win now")
            expect(page.get_by_role("alert").filter(has_text="mail")).to_contain_text(
                "404 adapter_not_found"
            )


def test_a_file_goes_on_when_the_service_was_overloaded(browser: Browser, tmp_path: Path) -> None:
    """One batch is held on the device, with a queue for less than a portion."""
    brake = Brake()
    with serve(tmp_path, load=brake.load, MAX_WAITING_TOKENS="600") as live:
        live.put("mail", make_adapter(make_backbone()))
        with open_console(browser, live.url) as console:
            page = console.page
            expect(page.get_by_label("Chosen: Adapters")).to_contain_text("mail")
            content = "".join(f"free win now number {number}\n" for number in range(400))
            drop(console, ".drop", "mails.txt", content.encode())
            brake.on()
            page.get_by_role("button", name="Label this file").click()
            page.wait_for_timeout(500)
            brake.off()
            expect(labelled(page, "400 texts")).to_be_visible(timeout=60_000)
            _, made = downloaded(console, "Download mails-labelled.csv")
            rows = list(csv.DictReader(io.StringIO(made.decode())))
            assert [row["text"] for row in rows] == content.splitlines()
            assert all(row["mail.label"] and not row["mail.error"] for row in rows)
