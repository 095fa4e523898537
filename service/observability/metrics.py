"""The metrics that Prometheus scrapes: their table, and the object that counts.

They use base units, exist before their first event, and have bounded labels: `adapter` and `label`
take the names of stored adapters and their labels only, and are removed with the adapter.
"""

import asyncio
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric as Samples
from prometheus_client.registry import Collector

from service.access.events import RefusalReason
from service.engine.interface import AdapterKey
from service.engine.observer import (
    NO_LABEL,
    BatchReport,
    ConnectionEnd,
    FailureReason,
    ImageEvent,
    Observer,
    Outcome,
    RecordLog,
    RolloutOutcome,
    Tier,
    UploadOutcome,
)
from service.engine.trials import MAX_DIRECTIONS, OTHER_LABEL, Cause, DropReason, Role
from service.errors import OverloadReason

_KINDS: Mapping[str, type[Counter] | type[Gauge] | type[Histogram]] = MappingProxyType(
    {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of `metrics.toml`, the table of all metrics."""

    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    labels: tuple[str, ...]
    help: str
    buckets: Sequence[float]


def _read(file: Path) -> tuple[Metric, ...]:
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    metrics = []
    for name, row in table["metrics"].items():
        buckets = table["buckets"][row.get("buckets", "seconds")]
        labels = tuple(row.get("labels", ()))
        metrics.append(Metric(name, _KINDS[row["kind"]], labels, row["help"], buckets))
    return tuple(metrics)


METRICS = _read(Path(__file__).with_suffix(".toml"))


def metrics_table() -> str:
    """The documentation's table, as Markdown."""
    lines = ["| Metric | Type | Labels | Meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
        lines.append(
            f"| `{metric.name}` | {metric.kind.__name__.lower()} | {labels} | {metric.help} |"
        )
    return "\n".join(lines) + "\n"


# An adapter with more labels has one series for all of them, to keep scrapes small.
MAX_LABELS = 512
ALL_LABELS = "(all)"
# The engine that has the catalog; those of further devices are engine-1, engine-2, ...
ENGINE = "engine"
# 1 where they do not apply.
_OF_REPLICAS = ("idspam_replica_lease_held", "idspam_follow_ok")


class Metrics(Observer):
    """Counts what is reported, in one registry. Every method may be called from any thread."""

    def __init__(
        self, registry: CollectorRegistry, *, routes: Iterable[str], error_types: Iterable[str]
    ) -> None:
        self._registry = registry
        self._by_name = {metric.name: _collector(metric, registry) for metric in METRICS}
        of = self._by_name
        outcomes: tuple[Outcome, ...] = get_args(Outcome)
        tiers: tuple[Tier, ...] = get_args(Tier)
        names = (*routes, "other")
        self._requests = {
            (route, outcome): of["idspam_requests_total"].labels(route, outcome)
            for route in names
            for outcome in outcomes
        }
        self._request_seconds = {
            route: of["idspam_request_seconds"].labels(route) for route in names
        }
        self._errors = _children(of["idspam_request_errors_total"], error_types)
        self._refusals = _children(of["idspam_access_refusals_total"], get_args(RefusalReason))
        self._failures = _children(of["idspam_failures_total"], get_args(FailureReason))
        self._overload_refusals = _children(
            of["idspam_overload_refusals_total"], get_args(OverloadReason)
        )
        self._tier_adapters = _children(of["idspam_tier_adapters"], ("stored", *tiers))
        self._tier_bytes = _children(of["idspam_tier_bytes"], ("stored", *tiers))
        self._loads = _children(of["idspam_adapter_loads_total"], tiers)
        self._load_seconds = _children(of["idspam_adapter_load_seconds"], tiers)
        self._images = _children(of["idspam_adapter_images_total"], get_args(ImageEvent))
        self._evictions = _children(of["idspam_adapter_evictions_total"], tiers)
        self._eviction_ages = _children(of["idspam_adapter_eviction_age_seconds"], tiers)
        self._passes = _children(of["idspam_passes_total"], ("graph", "eager"))
        self._ends = _children(of["idspam_connections_ended_total"], get_args(ConnectionEnd))
        self._records_dropped = _children(of["idspam_records_dropped_total"], get_args(RecordLog))
        self._uploads = _children(of["idspam_uploads_total"], get_args(UploadOutcome))
        self._rollouts = _children(of["idspam_rollouts_total"], get_args(RolloutOutcome))
        # So that alerts need not tell replicas from services that are none.
        self._is_replica = False
        for name in _OF_REPLICAS:
            of[name].set(1)
        of["idspam_devices"].set(1)
        self._predictions: dict[str, dict[str, Any]] = {}
        # Created when they are first counted: only some adapters give several labels.
        self._given: dict[str, dict[str, Any]] = {}
        # The same: only some adapters abstain.
        self._abstentions: dict[str, Any] = {}
        self._adapter_failures: dict[str, Any] = {}
        # Only some adapters try a second revision: the series of each, by metric and labels.
        self._trials: dict[str, dict[tuple[str, ...], Any]] = {}
        # Only adapters that are asked, and whose files have a profile: their quantities.
        self._drifts: dict[str, tuple[str, ...]] = {}
        self._endings = _children(of["idspam_traffic_endings_total"], get_args(Cause))

    def exposition(self, names: Sequence[str] | None = None) -> bytes:
        """Everything, or only what has these names, in Prometheus' text format."""
        if names is None:
            return generate_latest(self._registry)
        wanted = dict.fromkeys(names)
        chosen: list[_Collects] = [self._by_name[name] for name in wanted if name in self._by_name]
        # Those of the process and of Python, which the table does not have.
        others = [name for name in wanted if name not in self._by_name]
        if others:
            chosen.append(self._registry.restricted_registry(others))
        return generate_latest(_Some(chosen))

    async def scrape(self, names: Sequence[str] | None = None) -> bytes:
        # With thousands of adapters it takes a second, in which no request may wait.
        return await asyncio.to_thread(self.exposition, names)

    def request_done(
        self, route: str, outcome: Outcome, *, seconds: float, error: str | None = None
    ) -> None:
        known = route if route in self._request_seconds else "other"
        self._requests[known, outcome].inc()
        self._request_seconds[known].observe(seconds)
        if error is not None and error in self._errors:
            self._errors[error].inc()

    def tokenized(self, seconds: float, *, truncated: int) -> None:
        self._by_name["idspam_tokenize_seconds"].observe(seconds)
        if truncated:
            self._by_name["idspam_truncated_inputs_total"].inc(truncated)

    def predicted(self, adapter: str, label: str, count: int = 1) -> None:
        series = self._predictions.get(adapter, {})
        if (counter := series.get(label) or series.get(ALL_LABELS)) is not None:
            counter.inc(count)

    def label_given(self, adapter: str, label: str, count: int = 1) -> None:
        if (known := self._predictions.get(adapter)) is None:
            return
        if label != NO_LABEL and label not in known:
            if ALL_LABELS not in known:
                return
            label = ALL_LABELS
        given = self._given.setdefault(adapter, {})
        if (counter := given.get(label)) is None:
            counter = self._by_name["idspam_labels_given_total"].labels(adapter, label)
            given[label] = counter
        counter.inc(count)

    def abstained(self, adapter: str, count: int) -> None:
        if adapter not in self._predictions:
            return
        if (counter := self._abstentions.get(adapter)) is None:
            counter = self._by_name["idspam_abstentions_total"].labels(adapter)
            self._abstentions[adapter] = counter
        counter.inc(count)

    def adapter_failed(self, adapter: str, count: int) -> None:
        if (counter := self._adapter_failures.get(adapter)) is not None:
            counter.inc(count)

    def access_refused(self, reason: RefusalReason) -> None:
        self._refusals[reason].inc()

    def uploaded(self, outcome: UploadOutcome) -> None:
        self._uploads[outcome].inc()

    def connections(self, process: str, *, opened: int, held_bytes: int, stored_bytes: int) -> None:
        self._by_name["idspam_connections"].labels(process).set(opened)
        self._by_name["idspam_body_bytes"].labels(process, "memory").set(held_bytes)
        self._by_name["idspam_body_bytes"].labels(process, "disk").set(stored_bytes)

    def connections_ended(self, reason: ConnectionEnd, number: int) -> None:
        self._ends[reason].inc(number)

    def adapter_published(self, name: str, labels: Sequence[str]) -> None:
        """Create an adapter's series, and remove those of labels that it no longer has."""
        collector = self._by_name["idspam_predictions_total"]
        shown = tuple(labels) if len(labels) <= MAX_LABELS else (ALL_LABELS,)
        before = self._predictions.get(name, {})
        self._predictions[name] = {label: collector.labels(name, label) for label in shown}
        for label in set(before) - set(shown):
            collector.remove(name, label)
            if self._given.get(name, {}).pop(label, None) is not None:
                self._by_name["idspam_labels_given_total"].remove(name, label)
        failures = self._by_name["idspam_adapter_failures_total"]
        self._adapter_failures[name] = failures.labels(name)

    def adapter_removed(self, name: str) -> None:
        for label in self._predictions.pop(name, {}):
            self._by_name["idspam_predictions_total"].remove(name, label)
        for label in self._given.pop(name, {}):
            self._by_name["idspam_labels_given_total"].remove(name, label)
        if self._abstentions.pop(name, None) is not None:
            self._by_name["idspam_abstentions_total"].remove(name)
        if self._adapter_failures.pop(name, None) is not None:
            self._by_name["idspam_adapter_failures_total"].remove(name)
        for metric, *labels in self._trials.pop(name, {}):
            self._by_name[metric].remove(name, *labels)
        self._forget_drift(name)

    def stored(self, adapters: int, bytes_held: int) -> None:
        self._tier_adapters["stored"].set(adapters)
        self._tier_bytes["stored"].set(bytes_held)

    def audit_failed(self) -> None:
        self._by_name["idspam_audit_failures_total"].inc()

    def records_dropped(self, log: RecordLog, records: int) -> None:
        self._records_dropped[log].inc(records)

    def store_state(self, usable: bool, free_bytes: int) -> None:
        self._by_name["idspam_store_usable"].set(usable)
        self._by_name["idspam_store_free_bytes"].set(free_bytes)

    def followed(self, seconds: float, held: bool, applied: int, ok: bool) -> None:
        self._is_replica = True
        self._by_name["idspam_follow_seconds"].set(seconds)
        self._by_name["idspam_replica_lease_held"].set(held)
        self._by_name["idspam_replica_applied"].set(applied)
        self._by_name["idspam_follow_ok"].set(ok)

    def rolled_out(self, outcome: RolloutOutcome, seconds: float) -> None:
        self._rollouts[outcome].inc()
        if outcome == "committed":
            self._by_name["idspam_rollout_seconds"].observe(seconds)

    def started(self, *, version: str, backbone: str, device: str, dtype: str) -> None:
        self._by_name["idspam_build_info"].labels(version, backbone, device, dtype).set(1)

    def waiting_limit(self, tokens: int) -> None:
        self._by_name["idspam_waiting_tokens_limit"].set(tokens)

    def drifted(self, adapter: str, texts: int, shifts: Sequence[tuple[str, float, int]]) -> None:
        if adapter not in self._predictions or not shifts:
            self._forget_drift(adapter)
            return
        self._drifts[adapter] = tuple(quantity for quantity, _, _ in shifts)
        self._by_name["idspam_adapter_drift_texts"].labels(adapter).set(texts)
        for quantity, psi, level in shifts:
            self._by_name["idspam_adapter_drift_psi"].labels(adapter, quantity).set(psi)
            self._by_name["idspam_adapter_drift_level"].labels(adapter, quantity).set(level)

    def _forget_drift(self, adapter: str) -> None:
        if (quantities := self._drifts.pop(adapter, None)) is None:
            return
        self._by_name["idspam_adapter_drift_texts"].remove(adapter)
        for quantity in quantities:
            self._by_name["idspam_adapter_drift_psi"].remove(adapter, quantity)
            self._by_name["idspam_adapter_drift_level"].remove(adapter, quantity)

    def batch_done(self, report: BatchReport, engine: str = ENGINE) -> None:
        of = self._by_name
        of["idspam_engine_texts_total"].labels(engine).inc(report.rows)
        of["idspam_batch_rows"].observe(report.rows)
        of["idspam_batch_tokens"].observe(report.tokens)
        of["idspam_batch_adapters"].observe(report.adapters)
        of["idspam_inference_seconds"].observe(report.inference_seconds)
        if report.generator_seconds is not None:
            of["idspam_generator_seconds"].observe(report.generator_seconds)
        of["idspam_backbone_seconds"].observe(report.backbone_seconds)
        self._passes["graph"].inc(report.graphs)
        self._passes["eager"].inc(report.passes - report.graphs)
        for seconds in report.queue_seconds:
            of["idspam_queue_seconds"].observe(seconds)

    def waiting_tokens(self, tokens: int, engines: Mapping[str, int] | None = None) -> None:
        """engines: the part of each."""
        self._by_name["idspam_waiting_tokens"].set(tokens)
        for engine, part in (engines or {ENGINE: tokens}).items():
            self._by_name["idspam_engine_waiting_tokens"].labels(engine).set(part)

    def tier_size(self, tier: Tier, adapters: int, bytes_held: int) -> None:
        self._tier_adapters[tier].set(adapters)
        self._tier_bytes[tier].set(bytes_held)

    # Not counted by adapter, since the key's adapter may have been deleted meanwhile.

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:  # noqa: ARG002
        self._loads[tier].inc()
        self._load_seconds[tier].observe(seconds)

    def adapter_image(self, event: ImageEvent) -> None:
        self._images[event].inc()

    def adapter_evicted(
        self,
        key: AdapterKey,  # noqa: ARG002
        tier: Tier,
        age_seconds: float,
    ) -> None:
        self._evictions[tier].inc()
        self._eviction_ages[tier].observe(age_seconds)

    def overload_refused(self, reason: OverloadReason) -> None:
        self._overload_refusals[reason].inc()

    def pace(self, tokens_per_second: float, estimated_wait: float) -> None:
        self._by_name["idspam_device_tokens_per_second"].set(tokens_per_second)
        self._by_name["idspam_estimated_wait_seconds"].set(estimated_wait)

    def failed(self, reason: FailureReason, rows: int) -> None:
        self._failures[reason].inc(rows)

    def trial_set(self, adapter: str, percent: float | None, *, shadow: bool) -> None:
        modes = ("shadow", "canary") if shadow else ("canary", "shadow")
        known = self._trials.get(adapter, {})
        for mode in modes if percent is None else modes[1:]:
            if known.pop(("idspam_traffic_percent", mode), None) is not None:
                self._by_name["idspam_traffic_percent"].remove(adapter, mode)
        if percent is not None and adapter in self._predictions:
            self._trial(adapter, "idspam_traffic_percent", modes[0]).set(percent)
            # All series of a trial are there from its beginning.
            for role in get_args(Role):
                self._trial(adapter, "idspam_traffic_texts_total", role)
                self._trial(adapter, "idspam_traffic_errors_total", role)
            for reason in get_args(DropReason):
                self._trial(adapter, "idspam_traffic_dropped_total", reason)
            self.trial_compared(adapter, agreed=0, disagreed=0)

    def trial_ended(self, cause: Cause) -> None:
        self._endings[cause].inc()

    def trial_read(self, adapter: str, role: Role, texts: int, seconds: float | None) -> None:
        if adapter in self._trials:
            self._trial(adapter, "idspam_traffic_texts_total", role).inc(texts)
            if seconds is not None:
                self._trial(adapter, "idspam_traffic_seconds", role).observe(seconds)

    def trial_failed(self, adapter: str, role: Role, texts: int) -> None:
        if adapter in self._trials:
            self._trial(adapter, "idspam_traffic_errors_total", role).inc(texts)

    def trial_compared(self, adapter: str, *, agreed: int, disagreed: int) -> None:
        if adapter in self._trials:
            self._trial(adapter, "idspam_traffic_compared_total", "agree").inc(agreed)
            self._trial(adapter, "idspam_traffic_compared_total", "disagree").inc(disagreed)

    def trial_differed(self, adapter: str, before: str, after: str, texts: int) -> None:
        name = "idspam_traffic_disagreements_total"
        if (known := self._trials.get(adapter)) is None:
            return
        if (name, before, after) not in known:
            pairs = sum(key[0] == name for key in known)
            if pairs >= MAX_DIRECTIONS:
                before = after = OTHER_LABEL
        self._trial(adapter, name, before, after).inc(texts)

    def trial_scores(self, adapter: str, differences: Sequence[float]) -> None:
        if adapter in self._trials:
            series = self._trial(adapter, "idspam_traffic_score_difference")
            for difference in differences:
                series.observe(difference)

    def trial_dropped(self, adapter: str, reason: DropReason, texts: int) -> None:
        if adapter in self._trials:
            self._trial(adapter, "idspam_traffic_dropped_total", reason).inc(texts)

    def _trial(self, adapter: str, metric: str, *labels: str) -> Any:
        """A series of an adapter's trials; a new one only if the adapter is known."""
        known = self._trials.setdefault(adapter, {})
        if (series := known.get((metric, *labels))) is None:
            series = known[metric, *labels] = self._by_name[metric].labels(adapter, *labels)
        return series

    # Reported by the supervisor, which has this object.

    def processes(self, kind: str, alive: int) -> None:
        self._by_name["idspam_processes"].labels(kind).set(alive)

    def restarted(self, kind: str, processes: int = 1) -> None:
        self._by_name["idspam_process_restarts_total"].labels(kind).inc(processes)

    def process_used(self, process: str, *, resident_bytes: int, cpu_seconds: float) -> None:
        """Memory that a process holds, and processor time since the last call for it."""
        self._by_name["idspam_process_resident_bytes"].labels(process).set(resident_bytes)
        self._by_name["idspam_process_cpu_seconds_total"].labels(process).inc(cpu_seconds)

    def devices(self, number: int) -> None:
        """How many devices the service is to have."""
        self._by_name["idspam_devices"].set(number)

    def builds_gone(self) -> None:
        """Nothing is known to run, until `started` tells."""
        self._by_name["idspam_build_info"].clear()

    def engine_gone(self) -> None:
        """Reset the states that the engines' processes reported."""
        self._by_name["idspam_waiting_tokens"].set(0)
        self._by_name["idspam_engine_waiting_tokens"].clear()
        self.pace(0.0, 0.0)
        self.builds_gone()
        if self._is_replica:
            for name in _OF_REPLICAS:
                self._by_name[name].set(0)
        for tier in get_args(Tier):
            self.tier_size(tier, 0, 0)
        for adapter in list(self._drifts):
            self._forget_drift(adapter)

    def dropped(self, events: int) -> None:
        self._by_name["idspam_events_dropped_total"].inc(events)


class _Collects(Protocol):
    """What `_Some` needs of a collector."""

    def collect(self) -> Iterable[Samples]: ...


class _Some(Collector):
    """Some of the metrics, for `generate_latest`."""

    def __init__(self, collectors: Sequence[_Collects]) -> None:
        self._collectors = collectors

    def collect(self) -> Iterable[Samples]:
        for collector in self._collectors:
            yield from collector.collect()


def _collector(metric: Metric, registry: CollectorRegistry) -> Any:
    if issubclass(metric.kind, Histogram):
        return Histogram(
            metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
        )
    return metric.kind(metric.name, metric.help, metric.labels, registry=registry)


def _children(collector: Any, values: Iterable[str]) -> dict[str, Any]:
    return {value: collector.labels(value) for value in values}
