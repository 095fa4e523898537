"""The panels of `top`, from written scrapes and from real services of one or more processes."""

import math
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from cli.shell import CommandFailed
from service.client import Client
from service.commands.top import (
    METRICS,
    Between,
    Panel,
    Scrape,
    number,
    panels_of,
    parse,
    running,
)
from tests.support.http_service import RunningService, serve, until
from tests.support.service_process import TREE, ready_service
from tests.support.tiny_models import make_adapter, make_backbone, save_backbone
from tests.support.typed_commands import command, environment, terminal, typed

HEADINGS = {"traffic", "latency, ms", "batches", "tiers", "busiest adapters", "processes"}


def scrape(lines: str, seconds: float) -> Scrape:
    return parse(f"idspam_waiting_tokens 0\n{lines}\n", seconds=seconds)


def predictions(**counts: int) -> str:
    return "\n".join(
        f'idspam_predictions_total{{adapter="{key[0]}",label="{key[1]}"}} {count}'
        for key, count in counts.items()
    )


def panel(between: Between, heading: str, *, adapters: int = 10) -> Panel:
    (match,) = (item for item in panels_of(between, adapters=adapters) if item.heading == heading)
    return match


def rows(between: Between, heading: str) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in panel(between, heading).rows}


def test_rates_are_of_the_time_between_two_scrapes() -> None:
    between = Between(scrape(predictions(ax=10), 100.0), scrape(predictions(ax=40), 102.0))
    assert between.rate("idspam_predictions_total") == 15
    assert between.rate("idspam_nothing_total") == 0


def test_a_counter_that_was_reset_counts_from_zero() -> None:
    before = scrape(predictions(ax=1000, ay=5), 100.0)
    between = Between(before, scrape(predictions(ax=20, ay=6, bz=4), 102.0))
    assert between.rate("idspam_predictions_total") == (20 + 1 + 4) / 2


def buckets(*counts: int) -> str:
    bounds = ("0.1", "0.2", "0.4", "+Inf")
    lines = [
        f'idspam_queue_seconds_bucket{{le="{bound}"}} {count}'
        for bound, count in zip(bounds, counts, strict=True)
    ]
    return "\n".join(lines)


def test_quantiles_are_of_the_observations_between_two_scrapes() -> None:
    before, now = scrape(buckets(100, 100, 100, 100), 0.0), scrape(buckets(150, 190, 200, 200), 1.0)
    between = Between(before, now)
    assert between.quantile("idspam_queue_seconds", 0.25) == pytest.approx(0.05)
    assert between.quantile("idspam_queue_seconds", 0.7) == pytest.approx(0.15)
    assert between.quantile("idspam_queue_seconds", 0.95) == pytest.approx(0.3)
    beyond = Between(before, scrape(buckets(100, 100, 100, 101), 1.0))
    assert beyond.quantile("idspam_queue_seconds", 0.5) == 0.4
    assert math.isnan(Between(now, now).quantile("idspam_queue_seconds", 0.5))
    assert math.isnan(between.quantile("idspam_none_seconds", 0.5))


def test_probes_do_not_count_in_the_latency() -> None:
    def asked(ready: int, predict: int) -> str:
        return "\n".join(
            f'idspam_request_seconds_bucket{{route="{route}",le="{bound}"}} {count}'
            for route, low, high in (("/readyz", ready, ready), ("/v1/predict", 0, predict))
            for bound, count in (("0.001", low), ("1.0", high))
        )

    between = Between(scrape(asked(0, 0), 0.0), scrape(asked(1000, 10), 1.0))
    assert rows(between, "latency, ms")["request"][0] == "500"


def test_the_busiest_adapters_come_first_with_the_shares_of_their_labels() -> None:
    before = scrape(predictions(ax=5, ay=5, bx=0), 0.0)
    between = Between(before, scrape(predictions(ax=20, ay=10, bx=60, cz=5, dz=0), 2.0))
    busiest = panel(between, "busiest adapters", adapters=2)
    assert busiest.rows == [
        ["b", "30", "71%", "x 100%"],
        ["a", "10", "24%", "x 75%, y 25%"],
        ["and 1 more", "", "", ""],
    ]


def test_metrics_of_another_server_are_refused() -> None:
    for text in ("", "<html>", "up 1\n", '{"a": 1}', "idspam_x{ 1\n"):
        with pytest.raises(CommandFailed):
            parse(text, seconds=0.0)


def test_numbers_are_short() -> None:
    shown = {0: "0", 0.0042: "0.004", 0.5: "0.50", 3: "3", 12.34: "12.3", 1234.5: "1,234"}
    assert {value: number(value) for value in shown} == shown
    assert number(math.nan) == "-"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as serving:
        serving.put("a", make_adapter(make_backbone()))
        yield serving


def test_the_panels_show_what_a_service_did(live: RunningService) -> None:
    with Client(live.url) as client:
        before = parse(client.metrics(), seconds=0.0)
        assert len(list(client.classify(["free win"] * 40, "a", per_request=4))) == 40
        now = parse(client.metrics(), seconds=2.0)
    between = Between(before, now)
    assert {item.heading for item in panels_of(between, adapters=10)} == HEADINGS
    traffic = rows(between, "traffic")
    # Ten predictions; the first scrape is counted after it was answered.
    assert traffic["texts"] == ["20"]
    assert traffic["requests"] == ["5.50"]
    assert rows(between, "busiest adapters")["a"][0] == "20"
    assert all(cell != "-" for row in rows(between, "latency, ms").values() for cell in row)
    assert rows(between, "tiers")["active"][0] == "1"
    assert "tiny-bert-0, cpu, float32" in running(between)


def test_what_top_asks_for_is_all_that_the_panels_read(live: RunningService) -> None:
    with Client(live.url) as client:
        before = parse(client.metrics(), seconds=0.0)
        assert len(list(client.classify(["free win"] * 8, "a"))) == 8
        asked, whole = client.metrics(METRICS), client.metrics()
    some, everything = (Between(before, parse(text, seconds=2.0)) for text in (asked, whole))
    for mine, full in zip(
        panels_of(some, adapters=10), panels_of(everything, adapters=10), strict=True
    ):
        # The scrape in between is a request, and takes time and memory.
        if mine.heading in ("traffic", "latency, ms", "processes"):
            assert [row[0] for row in mine.rows] == [row[0] for row in full.rows]
        else:
            assert mine == full
    assert running(some) == running(everything)
    assert len(asked) < len(whole)


def test_one_view_is_printed_without_a_terminal(live: RunningService) -> None:
    done = typed("top", "--once", "--interval", "0.2", "--url", live.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{live.url}: ready; ")
    for heading in HEADINGS:
        assert heading in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_a_terminal_is_redrawn_until_ctrl_c(live: RunningService) -> None:
    words = command("top", "--interval", "0.1", "--url", live.url)
    with (
        terminal(40, 120) as (end, drawn),
        subprocess.Popen(words, cwd=TREE, env=environment(), stdout=end) as top,
    ):
        until(lambda: drawn.count(b"busiest adapters") >= 3)
        top.send_signal(signal.SIGINT)
        assert top.wait(10) == 130


@pytest.mark.slow
def test_several_processes_are_shown_by_name(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone")
    data = serialize(make_adapter(load_backbone(str(folder), device="cpu")))
    with ready_service(folder, tmp_path, workers=2) as service, Client(service.url) as client:
        client.upload("a", data)
        before = parse(client.metrics(), seconds=0.0)
        assert len(list(client.classify(["free win"] * 40, "a", per_request=4))) == 40

        def counted() -> Between:
            return Between(before, parse(client.metrics(), seconds=2.0))

        until(lambda: rows(counted(), "traffic")["texts"] == ["20"])
        processes = rows(counted(), "processes")
        assert set(processes) == {"supervisor", "standby", "engine", "worker-0", "worker-1"}
        assert all(float(cells[0].replace(",", "")) > 10 for cells in processes.values())
        assert processes["worker-0"][2] == "0"
