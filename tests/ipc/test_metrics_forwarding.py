"""Reports of several processes are counted once in the supervisor, within bounds."""

import asyncio
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import msgspec
import pytest
import zmq
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.engine.interface import AdapterKey
from service.engine.observer import BatchReport, Observer
from service.errors import Unavailable
from service.ipc import metrics_forwarding
from service.ipc.child import usage_of
from service.ipc.metrics_forwarding import (
    COUNTED,
    STATES,
    Event,
    Events,
    MetricsForwarder,
    MetricsReceiver,
    call_of,
    event,
)
from service.ipc.protocol import Codec, Undecodable, encode
from service.observability.metrics import Metrics

KEY = AdapterKey("a", "0" * 64)
ENGINE = os.getpid()


@dataclass
class Supervisor:
    """The receiving end of a supervisor, and forwarders to it."""

    context: "zmq.Context[zmq.Socket[bytes]]"
    endpoint: str
    metrics: Metrics
    receiver: MetricsReceiver
    refreshed: list[float]
    forwarders: list[MetricsForwarder] = field(default_factory=list)

    def forwarder(self) -> MetricsForwarder:
        """Open another one."""
        forwarder = MetricsForwarder(self.context, self.endpoint)
        forwarder.open()
        self.forwarders.append(forwarder)
        return forwarder


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    metrics = Metrics(CollectorRegistry(), routes=["/r"], error_types=["overloaded"])
    refreshed: list[float] = []
    with tempfile.TemporaryDirectory(prefix="metrics-") as folder, zmq.Context() as context:
        endpoint = f"ipc://{folder}/supervisor"
        receiver = MetricsReceiver(
            context, endpoint, metrics, refresh=lambda: refreshed.append(monotonic())
        )
        supervisor = Supervisor(context, endpoint, metrics, receiver, refreshed)
        try:
            yield supervisor
        finally:
            for forwarder in supervisor.forwarders:
                forwarder.close(0)
            receiver.close()


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


def report_everything(observer: Observer) -> None:
    """Call every method that reports anything, except `dropped`."""
    observer.started(version="1", backbone="b", device="cpu", dtype="float32")
    observer.waiting_limit(4096)
    observer.adapter_published("a", ["x", "y"])
    observer.adapter_published("gone", ["x"])
    observer.stored(2, 99)
    observer.request_done("/r", "success", seconds=0.25)
    observer.request_done("/nowhere", "overloaded", seconds=0.5, error="overloaded")
    observer.tokenized(0.125, truncated=2)
    for _ in range(3):
        observer.predicted("a", "x")
    observer.predicted("a", "y", 4)
    observer.predicted("unknown", "x")
    observer.adapter_failed("a", 2)
    observer.uploaded("created")
    observer.batch_done(report(3))
    observer.waiting_tokens(10)
    observer.waiting_tokens(7)
    observer.tier_size("active", 2, 1000)
    observer.tier_size("registered", 3, 2000)
    observer.adapter_loaded(KEY, "active", 0.5)
    observer.adapter_evicted(KEY, "registered", 30.0)
    observer.failed("deadline", 6)
    observer.drifted("a", 300, [("label", 0.02, 0), ("length", 0.5, 2)])
    observer.drifted("a", 400, [("label", 0.03, 0), ("length", 0.4, 2)])
    observer.drifted("unknown", 300, [("label", 0.02, 0)])
    observer.adapter_removed("gone")


async def test_what_is_forwarded_counts_as_if_it_were_counted_here(supervisor: Supervisor) -> None:
    here = Metrics(CollectorRegistry(), routes=["/r"], error_types=["overloaded"])
    report_everything(here)
    supervisor.receiver.set_engine(ENGINE)
    forwarder = supervisor.forwarder()
    report_everything(forwarder)
    assert values(await forwarder.scrape()) == values(here.exposition())
    assert supervisor.refreshed


def test_every_report_that_there_is_can_be_sent() -> None:
    reports = {name for name, _ in inspect.getmembers(Observer, inspect.isfunction)} - {"scrape"}
    assert reports == {*COUNTED, *STATES}
    assert not set(COUNTED) & set(STATES)
    assert all(getattr(Metrics, name) is not getattr(Observer, name) for name in reports)


HOSTILE: dict[str, Event[Any]] = {
    "a method that reports nothing": Event("scrape", {}),
    "an attribute": Event("__init__", {}),
    "a method of Metrics alone": Event("engine_gone", {}),
    "no method": Event("", {}),
    "no map": Event("dropped", [1]),
    "a missing argument": Event("dropped", {}),
    "an unknown argument": event("dropped", events=1, more=2),
    "a wrong type": event("dropped", "many"),
    "a wrong type within": event("adapter_published", "a", ["x", 1]),
    "an unknown outcome": event("uploaded", "lost"),
    "an unknown tier": event("tier_size", "disk", 1, 1),
    "an incomplete batch": event("batch_done", {"rows": 1}),
    "nesting": Event("dropped", msgspec.Raw(b"\x81\xa6events" + b"\x91" * 100_000)),
    "junk": Event("dropped", msgspec.Raw(b"\xc1")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_event_is_refused(name: str) -> None:
    metrics = Metrics(CollectorRegistry(), routes=["/r"], error_types=[])
    codec: Codec[Events[msgspec.Raw]] = Codec(Events[msgspec.Raw])

    def call(event: Event[Any]) -> None:
        (received,) = codec.decode(encode([Events(1, [event])]))
        call_of(received.events[0], metrics)()

    call(event("dropped", 1))
    with pytest.raises(Undecodable):
        call(HOSTILE[name])


async def test_a_frame_with_a_hostile_event_counts_nothing_and_the_next_one_counts(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    socket = supervisor.context.socket(zmq.DEALER)
    socket.connect(supervisor.endpoint)
    sound = event("uploaded", "created")
    for hostile in HOSTILE.values():
        socket.send(encode([Events(1, [sound, hostile])]))
    socket.send(encode([Events(1, [sound])]))
    forwarder = supervisor.forwarder()
    await _until(lambda: "idspam_uploads_total" in supervisor.metrics.exposition().decode())
    await asyncio.sleep(2 * metrics_forwarding.FLUSH_SECONDS)
    assert values(await forwarder.scrape())["idspam_uploads_total created"] == 1
    assert [message for message in caplog.messages if "refused a message" in message]
    socket.close(0)


async def test_a_scrape_holds_all_that_was_reported_before_it_and_the_rest_comes_by_itself(
    supervisor: Supervisor,
) -> None:
    forwarders = [supervisor.forwarder() for _ in range(3)]
    for count, forwarder in enumerate(forwarders):
        for _ in range(100 * (count + 1)):
            forwarder.request_done("/r", "success", seconds=0.0)
    shown = values(await forwarders[0].scrape())["idspam_requests_total success /r"]
    assert shown >= 100
    await asyncio.sleep(3 * metrics_forwarding.FLUSH_SECONDS)
    for forwarder in forwarders:
        shown = values(await forwarder.scrape())["idspam_requests_total success /r"]
        assert shown == 600


async def test_a_dead_engines_gauges_end_with_it_and_its_counters_stay(
    supervisor: Supervisor,
) -> None:
    supervisor.receiver.set_engine(ENGINE)
    forwarder = supervisor.forwarder()
    report_everything(forwarder)
    before = values(await forwarder.scrape())
    assert before["idspam_waiting_tokens"] == 7
    supervisor.receiver.set_engine(None)
    # What the dead process had sent before arrives late.
    report_everything(forwarder)
    after = values(await forwarder.scrape())
    assert after["idspam_waiting_tokens"] == 0
    for tier in ("active", "registered"):
        assert after[f"idspam_tier_adapters {tier}"] == 0
        assert after[f"idspam_tier_bytes {tier}"] == 0
    assert not [name for name in after if name.startswith("idspam_build_info")]
    for name in ("idspam_batch_rows_sum", "idspam_predictions_total a x"):
        assert after[name] == 2 * before[name]
    supervisor.receiver.set_engine(ENGINE)
    forwarder.waiting_tokens(3)
    assert values(await forwarder.scrape())["idspam_waiting_tokens"] == 3


async def test_series_of_an_adapter_are_there_before_a_worker_counts_in_them(
    supervisor: Supervisor,
) -> None:
    """The worker's message may be read first; the engine's is applied first."""
    supervisor.receiver.set_engine(ENGINE)
    worker = supervisor.context.socket(zmq.DEALER)
    worker.connect(supervisor.endpoint)
    worker.send(encode([Events(1, [event("predicted", "late", "x", 5)])]))
    # This loop reads nothing until both have sent.
    time.sleep(0.2)  # noqa: ASYNC251
    forwarder = supervisor.forwarder()
    forwarder.adapter_published("late", ["x"])
    time.sleep(0.2)  # noqa: ASYNC251
    shown = values(await forwarder.scrape())
    assert shown["idspam_predictions_total late x"] == 5
    worker.close()


async def test_a_flood_is_kept_in_bounds_and_what_is_dropped_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_forwarding, "MAX_EVENTS", 1000)
    with tempfile.TemporaryDirectory(prefix="flood-") as folder, zmq.Context() as context:
        endpoint = f"ipc://{folder}/supervisor"
        forwarder = MetricsForwarder(context, endpoint)
        forwarder.open()
        began, sent = monotonic(), 0
        # Nothing is bound there: frames fill the socket, then events the forwarder.
        for _ in range(200):
            for _ in range(50):
                forwarder.request_done("/r", "success", seconds=0.0)
            sent += 50
            forwarder.flush()
        assert monotonic() - began < 5
        assert len(forwarder._events) <= 1000
        metrics = Metrics(CollectorRegistry(), routes=["/r"], error_types=[])
        receiver = MetricsReceiver(context, endpoint, metrics, refresh=lambda: None)
        await _until(lambda: not forwarder._events)
        shown = values(await forwarder.scrape())
        dropped = shown["idspam_events_dropped_total"]
        assert dropped > 0
        assert shown["idspam_requests_total success /r"] + dropped == sent
        forwarder.close(0)
        receiver.close()


async def test_a_scrape_that_nothing_answers_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_forwarding, "SCRAPE_SECONDS", 0.2)
    with tempfile.TemporaryDirectory(prefix="nothing-") as folder, zmq.Context() as context:
        forwarder = MetricsForwarder(context, f"ipc://{folder}/supervisor")
        with pytest.raises(Unavailable):
            await forwarder.scrape()
        forwarder.open()
        with pytest.raises(Unavailable, match="does not answer"):
            await forwarder.scrape()
        forwarder.close(0)


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
