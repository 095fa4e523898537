"""What parts measure arrives at the one place that counts: once, in bounds, and no dead gauges."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import get_args

import pytest
import zmq
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.engine.interface import AdapterKey
from service.engine.observer import BatchReport, EngineObserver
from service.errors import Unavailable
from service.ipc import metrics_forwarding as relaying
from service.ipc.child import usage_of
from service.ipc.metrics_forwarding import AnyEvent, Counted, Counting, Event, Predicted, Relay
from service.ipc.protocol import encode
from service.local import LocalObserver
from service.observability.metrics import Metrics, Reporter
from tests.support.engine_harness import run

KEY = AdapterKey("a", "0" * 64)
ENGINE = os.getpid()


@dataclass
class Place:
    """A counting supervisor's part, and relays to it."""

    context: "zmq.Context[zmq.Socket[bytes]]"
    endpoint: str
    metrics: Metrics
    counting: Counting
    refreshed: list[float]
    relays: list[Relay] = field(default_factory=list)

    def relay(self) -> Relay:
        made = Relay(self.context, self.endpoint)
        made.open()
        self.relays.append(made)
        return made


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    metrics = Metrics(CollectorRegistry(), routes=["/r"], error_types=["overloaded"])
    refreshed: list[float] = []
    with tempfile.TemporaryDirectory(prefix="counting-") as folder, zmq.Context() as context:
        endpoint = f"ipc://{folder}/supervisor"
        counting = Counting(
            context, endpoint, metrics, refresh=lambda: refreshed.append(monotonic())
        )
        found = Place(context, endpoint, metrics, counting, refreshed)
        try:
            yield found
        finally:
            for relay in found.relays:
                relay.close(0)
            counting.close()


def values(text: bytes) -> dict[str, float]:
    return {
        sample.name + "".join(f" {item}" for _, item in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


def report(rows: int) -> BatchReport:
    return BatchReport(
        rows=rows,
        tokens=10 * rows,
        adapters=1,
        queue_seconds=[0.5] * rows,
        generator_seconds=0.001,
        backbone_seconds=0.002,
        inference_seconds=0.004,
    )


def everything(observer: Relay | Metrics) -> None:
    """One call or more of everything that can be reported."""
    reporter: Reporter = observer
    engine: EngineObserver = observer
    local: LocalObserver = observer
    local.started(version="1", backbone="b", device="cpu", dtype="float32")
    local.adapter_published("a", ["x", "y"])
    local.adapter_published("gone", ["x"])
    local.stored(2, 99)
    reporter.request_done("/r", "success", seconds=0.25)
    reporter.request_done("/nowhere", "overloaded", seconds=0.5, error="overloaded")
    reporter.tokenized(0.125, truncated=2)
    for _ in range(3):
        reporter.predicted("a", "x")
    reporter.predicted("a", "y", 4)
    reporter.predicted("unknown", "x")
    reporter.uploaded("created")
    engine.batch_done(report(3))
    engine.waiting_tokens(10)
    engine.waiting_tokens(7)
    engine.tier_size("active", 2, 1000)
    engine.tier_size("registered", 3, 2000)
    engine.adapter_loaded(KEY, "active", 0.5)
    engine.adapter_evicted(KEY, "registered", 30.0)
    engine.failed("deadline", 6)
    local.adapter_removed("gone")


def test_what_is_relayed_counts_as_if_it_were_counted_here() -> None:
    async def test() -> None:
        here = Metrics(CollectorRegistry(), routes=["/r"], error_types=["overloaded"])
        everything(here)
        async with place() as found:
            found.counting.engine_is(ENGINE)
            relay = found.relay()
            everything(relay)
            assert values(await relay.scrape()) == values(here.exposition())
            assert found.refreshed

    run(test())


def test_every_event_there_is_can_be_sent() -> None:
    def leaves(kind: type) -> set[type]:
        below: list[type] = kind.__subclasses__()
        return {kind} if not below else set().union(*(leaves(item) for item in below))

    assert leaves(Event) == set(get_args(AnyEvent))


def test_a_scrape_holds_all_that_was_reported_before_it_and_the_rest_comes_by_itself() -> None:
    async def test() -> None:
        async with place() as found:
            relays = [found.relay() for _ in range(3)]
            for count, relay in enumerate(relays):
                for _ in range(100 * (count + 1)):
                    relay.request_done("/r", "success", seconds=0.0)
            shown = values(await relays[0].scrape())["idspam_requests_total success /r"]
            assert shown >= 100
            await asyncio.sleep(3 * relaying.FLUSH_SECONDS)
            for relay in relays:
                shown = values(await relay.scrape())["idspam_requests_total success /r"]
                assert shown == 600

    run(test())


def test_a_dead_engines_gauges_end_with_it_and_its_counters_stay() -> None:
    async def test() -> None:
        async with place() as found:
            found.counting.engine_is(ENGINE)
            relay = found.relay()
            everything(relay)
            before = values(await relay.scrape())
            assert before["idspam_waiting_tokens"] == 7
            found.counting.engine_is(None)
            # What the dead had sent before comes late.
            everything(relay)
            after = values(await relay.scrape())
            assert after["idspam_waiting_tokens"] == 0
            for tier in ("active", "registered"):
                assert after[f"idspam_tier_adapters {tier}"] == 0
                assert after[f"idspam_tier_bytes {tier}"] == 0
            assert not [name for name in after if name.startswith("idspam_build_info")]
            for name in ("idspam_batch_rows_sum", "idspam_predictions_total a x"):
                assert after[name] == 2 * before[name]
            found.counting.engine_is(ENGINE)
            relay.waiting_tokens(3)
            assert values(await relay.scrape())["idspam_waiting_tokens"] == 3

    run(test())


def test_series_of_an_adapter_are_there_before_a_worker_counts_in_them() -> None:
    """The worker's message may be read first; the engine's is applied first."""

    async def test() -> None:
        async with place() as found:
            found.counting.engine_is(ENGINE)
            worker = found.context.socket(zmq.DEALER)
            worker.connect(found.endpoint)
            worker.send(encode([Counted(1, [Predicted("late", "x", 5)])]))
            # This loop reads nothing until both have spoken.
            time.sleep(0.2)  # noqa: ASYNC251
            relay = found.relay()
            relay.adapter_published("late", ["x"])
            time.sleep(0.2)  # noqa: ASYNC251
            shown = values(await relay.scrape())
            assert shown["idspam_predictions_total late x"] == 5
            worker.close()

    run(test())


def test_a_flood_is_kept_in_bounds_and_what_is_dropped_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relaying, "MAX_EVENTS", 1000)

    async def test() -> None:
        with tempfile.TemporaryDirectory(prefix="flood-") as folder, zmq.Context() as context:
            endpoint = f"ipc://{folder}/supervisor"
            relay = Relay(context, endpoint)
            relay.open()
            began, sent = monotonic(), 0
            # Nobody is there: frames fill the socket, then events the relay.
            for _ in range(200):
                for _ in range(50):
                    relay.request_done("/r", "success", seconds=0.0)
                sent += 50
                relay.flush()
            assert monotonic() - began < 5
            assert len(relay._events) <= 1000
            metrics = Metrics(CollectorRegistry(), routes=["/r"], error_types=[])
            counting = Counting(context, endpoint, metrics, refresh=lambda: None)
            await _until(lambda: not relay._events)
            shown = values(await relay.scrape())
            dropped = shown["idspam_events_dropped_total"]
            assert dropped > 0
            assert shown["idspam_requests_total success /r"] + dropped == sent
            relay.close(0)
            counting.close()

    run(test())


def test_a_scrape_that_nobody_answers_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaying, "SCRAPE_SECONDS", 0.2)

    async def test() -> None:
        with tempfile.TemporaryDirectory(prefix="nobody-") as folder, zmq.Context() as context:
            relay = Relay(context, f"ipc://{folder}/supervisor")
            with pytest.raises(Unavailable):
                await relay.scrape()
            relay.open()
            with pytest.raises(Unavailable, match="does not answer"):
                await relay.scrape()
            relay.close(0)

    run(test())


def test_usage_is_that_of_the_process() -> None:
    mine = usage_of(os.getpid())
    assert mine is not None
    assert 2**20 < mine.resident_bytes < 2**40
    assert 0 < mine.cpu_seconds < 10_000
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert usage_of(ended.pid) is None


async def _until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline
        await asyncio.sleep(0.01)
