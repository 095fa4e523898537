"""Metrics: everything is counted once, labels are bounded, and the documented table is complete."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.registry import Collector

from adapters import __version__
from service.engine.interface import AdapterKey
from service.engine.observer import BatchReport, FailureReason, Observer, Outcome
from service.observability.metrics import ALL_LABELS, MAX_LABELS, METRICS, Metrics, metrics_table
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone

KEY = AdapterKey("a", "0" * 64)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[RunningService]:
    with serve(tmp_path) as running:
        yield running


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry(), routes=["/v1/predict"], error_types=["overloaded"])


def lines(metrics: Metrics, start: str) -> list[str]:
    shown = metrics.exposition().decode().splitlines()
    return [line for line in shown if line.startswith(start) and "_created" not in line]


def test_metrics_are_what_the_engine_reports_to(metrics: Metrics) -> None:
    observer: Observer = metrics
    observer.batch_done(
        BatchReport(
            rows=3,
            tokens=70,
            adapters=2,
            queue_seconds=[0.001, 0.002, 0.003],
            generator_seconds=0.001,
            backbone_seconds=0.004,
            inference_seconds=0.006,
            passes=3,
            graphs=1,
        )
    )
    observer.waiting_tokens(41)
    observer.tier_size("active", 2, 1000)
    observer.adapter_loaded(KEY, "active", 0.5)
    observer.adapter_image("refused")
    observer.adapter_evicted(KEY, "registered", 30.0)
    for reason in get_args(FailureReason):
        observer.failed(reason, 2)
    for line in (
        "idspam_batch_rows_sum 3.0",
        "idspam_batch_tokens_sum 70.0",
        'idspam_passes_total{kind="graph"} 1.0',
        'idspam_adapter_images_total{event="refused"} 1.0',
        'idspam_passes_total{kind="eager"} 2.0',
        "idspam_batch_adapters_sum 2.0",
        "idspam_queue_seconds_count 3.0",
        "idspam_queue_seconds_sum 0.006",
        "idspam_generator_seconds_sum 0.001",
        "idspam_backbone_seconds_sum 0.004",
        "idspam_inference_seconds_sum 0.006",
        "idspam_waiting_tokens 41.0",
        'idspam_tier_adapters{tier="active"} 2.0',
        'idspam_tier_bytes{tier="active"} 1000.0',
        'idspam_adapter_loads_total{tier="active"} 1.0',
        'idspam_adapter_load_seconds_sum{tier="active"} 0.5',
        'idspam_adapter_evictions_total{tier="registered"} 1.0',
        'idspam_adapter_eviction_age_seconds_sum{tier="registered"} 30.0',
    ):
        assert lines(metrics, line.rpartition(" ")[0] + " ") == [line]
    failures = lines(metrics, "idspam_failures_total")
    assert len(failures) == len(get_args(FailureReason))
    assert all(line.endswith(" 2.0") for line in failures)


def test_series_exist_before_anything_happened(metrics: Metrics) -> None:
    shown = metrics.exposition().decode()
    for metric in METRICS:
        assert f"# HELP {metric.name.removesuffix('_total')}" in shown
    outcomes = len(get_args(Outcome))
    assert len(lines(metrics, "idspam_requests_total")) == 2 * outcomes
    assert lines(metrics, "idspam_request_errors_total{") == [
        'idspam_request_errors_total{type="overloaded"} 0.0'
    ]
    assert lines(metrics, "idspam_predictions_total") == []


def test_every_name_has_the_prefix_and_a_base_unit_and_buckets_reach_from_fast_to_slow() -> None:
    for metric in METRICS:
        assert metric.name.startswith("idspam_")
        assert not metric.name.endswith(("_ms", "_kb", "_mb"))
    seconds = next(metric for metric in METRICS if metric.name == "idspam_request_seconds")
    assert (seconds.buckets[0], seconds.buckets[-1]) == (0.00025, 4.0)


def test_unknown_routes_and_errors_make_no_new_series(metrics: Metrics) -> None:
    before = len(metrics.exposition().splitlines())
    for index in range(50):
        metrics.request_done(f"/{index}", "client_error", seconds=0.1, error=f"e{index}")
        metrics.predicted(f"adapter{index}", "label")
    assert len(metrics.exposition().splitlines()) == before
    line = 'idspam_requests_total{outcome="client_error",route="other"}'
    assert lines(metrics, line) == [f"{line} 50.0"]


def test_adapter_series_come_with_an_adapter_and_go_with_it(metrics: Metrics) -> None:
    def series() -> dict[str, float]:
        parts = (line.rpartition(" ") for line in lines(metrics, "idspam_predictions_total{"))
        return {name.partition("{")[2]: float(value) for name, _, value in parts}

    metrics.adapter_published("a", ["x", "y"])
    metrics.predicted("a", "x")
    metrics.adapter_published("a", ["x", "z"])
    assert series() == {'adapter="a",label="x"}': 1.0, 'adapter="a",label="z"}': 0.0}
    metrics.adapter_published("b", [f"l{index}" for index in range(MAX_LABELS + 1)])
    metrics.predicted("b", "l7")
    assert series()[f'adapter="b",label="{ALL_LABELS}"}}'] == 1.0
    metrics.adapter_removed("a")
    metrics.adapter_removed("a")
    metrics.predicted("a", "x")
    assert set(series()) == {f'adapter="b",label="{ALL_LABELS}"}}'}


def test_drift_has_series_of_known_adapters_until_it_is_unknown_again(metrics: Metrics) -> None:
    def series() -> int:
        return len(lines(metrics, "idspam_adapter_drift"))

    shifts = [("label", 0.02, 0), ("length", 0.6, 2)]
    metrics.drifted("a", 300, shifts)
    assert series() == 0
    metrics.adapter_published("a", ["x", "y"])
    voids: tuple[Callable[[], None], ...] = (
        lambda: metrics.drifted("a", 0, ()),
        metrics.engine_gone,
        lambda: metrics.adapter_removed("a"),
    )
    for void in voids:
        metrics.drifted("a", 300, shifts)
        assert series() == 5
        level = 'idspam_adapter_drift_level{adapter="a",quantity="length"}'
        assert lines(metrics, level) == [f"{level} 2.0"]
        void()
        assert series() == 0


def test_a_replica_whose_engine_has_ended_neither_follows_nor_holds_its_lease(
    metrics: Metrics,
) -> None:
    names = ("idspam_replica_lease_held", "idspam_follow_ok")

    def shown() -> list[str]:
        return [line.split()[1] for name in names for line in lines(metrics, name)]

    metrics.engine_gone()
    # Without a shared store neither matters.
    assert shown() == ["1.0", "1.0"]
    metrics.followed(0.1, True, 7, True)
    assert shown() == ["1.0", "1.0"]
    metrics.engine_gone()
    assert shown() == ["0.0", "0.0"]


@pytest.mark.slow
def test_each_request_is_counted_once_whatever_became_of_it(live: RunningService) -> None:
    live.put("a", make_adapter(make_backbone(), max_length=8))
    for _ in range(5):
        live.predict(adapter="a", inputs=["x", "win " * 20, "y"])
    for _ in range(3):
        live.client.post("/v1/predict", json={"adapter": "none", "inputs": "x"})
    live.client.post("/v1/predict", content=b"{", headers={"Content-Type": "application/json"})
    live.client.get("/nowhere")
    live.client.put("/v1/adapters/b", content=b"x")
    route = "/v1/predict"
    counted = {
        outcome: live.metric("idspam_requests_total", route=route, outcome=outcome)
        for outcome in get_args(Outcome)
    }
    assert counted == dict.fromkeys(get_args(Outcome), 0.0) | {"success": 5.0, "client_error": 4.0}
    assert live.metric("idspam_request_seconds_count", route=route) == 9
    for kind, count in (("adapter_not_found", 3), ("malformed_request", 1), ("not_found", 1)):
        assert live.metric("idspam_request_errors_total", type=kind) == count
    assert live.metric("idspam_tokenize_seconds_count") == 5
    assert live.metric("idspam_truncated_inputs_total") == 5
    predicted = [
        live.metric("idspam_predictions_total", adapter="a", label=label)
        for label in ("ham", "spam")
    ]
    assert sum(predicted) == 15
    # One row more: the upload was run once, with a text of its own.
    assert live.metric("idspam_batch_rows_sum") == 16
    assert live.metric("idspam_queue_seconds_count") == 16
    assert live.metric("idspam_uploads_total", outcome="created") == 1
    assert live.metric("idspam_uploads_total", outcome="refused") == 1
    assert live.metric("idspam_tier_adapters", tier="stored") == 1
    assert live.metric("idspam_tier_adapters", tier="active") == 1
    assert live.metric("idspam_waiting_tokens") == 0
    build = {"version": __version__, "backbone": "tiny-bert-0", "device": "cpu", "dtype": "float32"}
    assert live.metric("idspam_build_info", **build) == 1


def test_the_table_names_every_metric_and_api_page_has_it() -> None:
    table = metrics_table()
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.kind.__name__.lower()} |" in table
    page = Path(__file__).resolve().parents[2] / "docs" / "api.md"
    assert table in page.read_text(), "run: python -m service metrics"


def test_metrics_of_the_process_can_be_asked_for_by_name() -> None:
    registry = CollectorRegistry(support_collectors_without_names=True)
    metrics = Metrics(registry, routes=["/v1/predict"], error_types=["overloaded"])
    ProcessCollector(registry=registry)
    wanted = ["process_resident_memory_bytes", "idspam_waiting_tokens", "process_no_such"]
    lines = metrics.exposition(wanted).decode().splitlines()
    assert {line.split()[0] for line in lines if line[0] != "#"} == set(wanted[:2])


async def test_other_work_goes_on_while_the_metrics_are_written() -> None:
    gone_on = threading.Event()
    seen: list[bool] = []

    class Slow(Collector):
        def collect(self) -> Iterator[Metric]:
            seen.append(gone_on.wait(5))
            return iter(())

    registry = CollectorRegistry(support_collectors_without_names=True)
    metrics = Metrics(registry, routes=["/v1/predict"], error_types=["overloaded"])
    registry.register(Slow())
    scraping = asyncio.create_task(metrics.scrape())
    await asyncio.sleep(0.01)
    gone_on.set()
    assert b"idspam_waiting_tokens" in await scraping
    assert seen == [True]
