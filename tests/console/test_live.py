"""The page Live: what /metrics says, as charts and as numbers."""

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect
from prometheus_client.parser import text_string_to_metric_families

from service.commands.top import _quantile
from tests.support.browser import Console, open_console
from tests.support.http_service import serve
from tests.support.key_files import write_keys
from tests.support.service_process import ReadyService

pytestmark = pytest.mark.slow

TEXTS = ["free entry in a weekly competition", "see you at eight", "my card has not come"]
PARSE = """async text => {
  const { parse } = await import('/console/parts/prometheus.js');
  return [...parse(text)].flatMap(([name, samples]) =>
    samples.map(({ labels, value }) => [name, Object.entries(labels).sort(), String(value)]));
}"""
QUANTILE = """async ([bounds, below, share]) => {
  const { quantile } = await import('/console/parts/prometheus.js');
  return quantile({ bounds: bounds.map(bound => bound ?? Infinity), below }, share);
}"""
KEPT = """async seconds => {
  const { Samples, WINDOWS } = await import('/console/parts/samples.js');
  const samples = new Samples();
  for (let at = 0; at <= seconds; at += 2) samples.add({ at });
  return WINDOWS.map(window => samples.within(window).map(({ at }) => at));
}"""


@contextmanager
def asked(url: str) -> Iterator[None]:
    """A few requests a second, for several adapters each, until the block ends."""
    inputs = [
        {"text": text, "adapter": name}
        for text in TEXTS
        for name in ("sms-spam", "sentiment", "banking77")
    ]
    done = threading.Event()
    statuses: set[int] = set()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not done.wait(0.15):
                statuses.add(client.post("/v1/predict", json={"inputs": inputs}).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert statuses == {200}


def test_a_load_is_seen_in_every_chart(browser: Browser, zoo: ReadyService) -> None:
    with (
        asked(zoo.url),
        open_console(browser, zoo.url, route="#/live?window=60") as console,
    ):
        page = console.page
        expect(page.get_by_text("all-MiniLM-L6-v2 on cpu")).to_be_visible()
        texts = page.get_by_role("region", name="Texts per second")
        expect(texts.get_by_role("img")).to_have_accessible_name(re.compile(r"texts: now [1-9]"))
        # Adapters share a batch; what is drawn is said in words and is there as numbers.
        shared = page.get_by_role("region", name="Adapters in a batch")
        expect(shared.get_by_role("img")).to_have_accessible_name(
            re.compile(r"Adapters in a batch, \d+ s ago until now: mean: now [\d.]+")
        )
        assert shared.locator("path.line-0").last.get_attribute("d")
        shared.get_by_text("Numbers").click()
        expect(shared.get_by_role("row", name=re.compile("^now"))).to_be_visible()
        stages = page.get_by_role("region", name="Latency: inference")
        expect(stages.locator(".legend")).to_contain_text(re.compile(r"p50 [\d.]+ ms"))
        tiers = page.get_by_role("region", name="Where adapters are")
        expect(tiers.get_by_role("row", name="in the store")).to_contain_text("4")
        expect(page.get_by_role("region", name="Queue", exact=True)).to_contain_text("of at most")
        console.look_at("live")
        page.get_by_role("button", name="Pause").click()
        paused = texts.inner_text()
        page.wait_for_timeout(2500)
        assert texts.inner_text() == paused
        page.get_by_role("button", name="Go on").click()
        page.get_by_label("Show the last").select_option("1 hour")
        assert "window=3600" in page.url


def test_refusals_are_counted_by_reason(browser: Browser, tmp_path: Path) -> None:
    with (
        serve(tmp_path / "adapters", ALLOWED_HOSTS="known.example.org") as live,
        open_console(browser, live.url, route="#/live") as console,
    ):
        table = console.page.get_by_role("region", name="Refused and failed")
        expect(table).to_contain_text("nothing")
        refused = live.client.get("/v1/adapters", headers={"Host": "evil.example.org"})
        assert refused.status_code == 403
        expect(table.get_by_role("row", name="key, quota or origin: host")).to_contain_text("1")


def test_a_key_without_the_scope_of_metrics_is_told_so(browser: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    tokens = write_keys(
        keys, reader={"scopes": ["predict", "adapters:read"]}, watcher={"scopes": ["metrics"]}
    )
    with (
        serve(tmp_path / "adapters", KEYS_FILE=str(keys)) as live,
        open_console(browser, live.url, route="#/live") as console,
    ):
        page = console.page
        expect(page.get_by_role("alert").filter(has_text="401 unauthorized")).to_be_visible()
        # A page that reads by itself opens no dialog.
        dialog = page.get_by_role("dialog")
        expect(dialog).to_have_count(0)
        page.get_by_role("button", name="Use another key").click()
        dialog.get_by_label("Key").fill(tokens["reader"])
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("this needs a key with the scope metrics")
        page.keyboard.press("Escape")
        expect(page.get_by_text("needs a key with the scope metrics").last).to_be_visible()
        console.look_at("live-without-scope", themes=("light",))
        page.get_by_role("button", name="Use another key").click()
        dialog.get_by_label("Key").fill(tokens["watcher"])
        page.keyboard.press("Enter")
        expect(page.get_by_text("tiny-bert-0 on cpu")).to_be_visible()
        expect(page.get_by_role("alert").filter(has_text="scope")).to_have_count(0)


def test_metrics_are_read_as_prometheus_reads_them(console: Console, zoo: ReadyService) -> None:
    text = httpx.get(f"{zoo.url}/metrics").text
    text += 'odd{a="x \\\\ \\" \\n }, b=",b=""} NaN\nodd 1e-3 1700000000\nodd{le="+Inf"} +Inf\n'
    expected = [
        [sample.name, sorted(map(list, sample.labels.items())), sample.value]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    found = [[name, labels, float(value)] for name, labels, value in console.run(PARSE, text)]

    def ordered(samples: list[list[Any]]) -> list[str]:
        return sorted(map(repr, samples))

    assert len(found) > 500
    assert ordered(found) == ordered(expected)
    garbage = 'no value\n{}\nx{a=b} 1\nx{a="b} 1\nx 1 2 3 4\n\0\n# comment\n'
    assert console.run(PARSE, garbage) == []


def test_quantiles_are_those_of_top(console: Console) -> None:
    bounds = [0.1, 0.5, 1.0, math.inf]
    for below in ([0, 0, 0, 0], [1, 1, 1, 1], [2, 5, 5, 9], [0, 0, 0, 4], [3, 10, 20, 20]):
        for share in (0.0, 0.5, 0.95, 1.0):
            expected = _quantile(list(zip(bounds, map(float, below), strict=True)), share)
            # Infinity does not travel as JSON.
            sent = [None if math.isinf(bound) else bound for bound in bounds]
            found = console.run(QUANTILE, [sent, below, share])
            assert (found is None) == math.isnan(expected)
            if found is not None:
                assert found == pytest.approx(expected)


def test_an_hour_is_kept_coarser_the_older_it_is(console: Console) -> None:
    minute, five, quarter, hour = console.run(KEPT, 8000)
    assert (minute[-1], five[-1], quarter[-1], hour[-1]) == (8000,) * 4
    for times, seconds, most in (
        (minute, 60, 33),
        (five, 300, 33),
        (quarter, 900, 33),
        (hour, 3600, 63),
    ):
        assert seconds * 0.95 <= times[-1] - times[0] <= seconds + 60
        assert len(times) <= most
        assert times == sorted(set(times))
    # In the first minute every window shows what there is.
    for seconds in (4, 60):
        assert console.run(KEPT, seconds) == [list(range(0, seconds + 1, 2))] * 4
    assert console.run(KEPT, 80)[1:] == [list(range(0, 81, 10))] * 3
