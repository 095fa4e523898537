"""Every metric there is: name, kind, labels, meaning. `service.metrics` counts in them.

Base units, and labels whose values are bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (
    0.00025,
    0.0005,
    0.001,
    0.002,
    0.004,
    0.008,
    0.016,
    0.032,
    0.064,
    0.125,
    0.25,
    0.5,
    1.0,
    2.0,
    4.0,
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
AGES = (1, 10, 60, 300, 900, 3600, 14400, 86400)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. Counters end in `_total` on the wire."""

    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    labels: tuple[str, ...]
    help: str
    buckets: Sequence[float] = SECONDS


METRICS = (
    Metric(
        "idspam_requests_total",
        Counter,
        ("route", "outcome"),
        "Requests answered, by route and outcome",
    ),
    Metric(
        "idspam_request_errors_total",
        Counter,
        ("type",),
        "Requests answered with an error, by its type",
    ),
    Metric(
        "idspam_request_seconds",
        Histogram,
        ("route",),
        "From the first byte of a request to the last of its answer",
    ),
    Metric("idspam_tokenize_seconds", Histogram, (), "Turning a request's texts into tokens"),
    Metric("idspam_queue_seconds", Histogram, (), "A text's wait from admission to its batch"),
    Metric("idspam_inference_seconds", Histogram, (), "One batch, from packing to scores"),
    Metric("idspam_generator_seconds", Histogram, (), "A batch's share spent making prompts"),
    Metric("idspam_backbone_seconds", Histogram, (), "A batch's share spent in the backbone"),
    Metric(
        "idspam_passes_total",
        Counter,
        ("kind",),
        "Forward passes: graph (a single launch, on CUDA) or eager",
    ),
    Metric("idspam_batch_rows", Histogram, (), "Texts in a batch", ROWS),
    Metric("idspam_batch_tokens", Histogram, (), "Tokens and prompt slots in a batch", TOKENS),
    Metric("idspam_batch_adapters", Histogram, (), "Distinct adapters in a batch", ROWS),
    Metric("idspam_waiting_tokens", Gauge, (), "Tokens admitted and not yet in a batch"),
    Metric(
        "idspam_waiting_tokens_limit",
        Gauge,
        (),
        "Tokens that may wait at most: `IDSPAM_MAX_WAITING_TOKENS`",
    ),
    Metric(
        "idspam_failures_total",
        Counter,
        ("reason",),
        "Texts that got an error from the engine, by reason",
    ),
    Metric(
        "idspam_tier_adapters",
        Gauge,
        ("tier",),
        "Adapters in a tier: stored, registered (host), active (device)",
    ),
    Metric("idspam_tier_bytes", Gauge, ("tier",), "Memory that a tier's adapters take"),
    Metric("idspam_adapter_loads_total", Counter, ("tier",), "Adapters that entered a tier"),
    Metric("idspam_adapter_load_seconds", Histogram, ("tier",), "How long entering a tier took"),
    Metric("idspam_adapter_evictions_total", Counter, ("tier",), "Adapters that left a tier"),
    Metric(
        "idspam_adapter_eviction_age_seconds",
        Histogram,
        ("tier",),
        "Time since an evicted adapter was last used",
        AGES,
    ),
    Metric("idspam_uploads_total", Counter, ("outcome",), "Adapter uploads by outcome"),
    Metric(
        "idspam_predictions_total",
        Counter,
        ("adapter", "label"),
        "Texts answered, by adapter and best label",
    ),
    Metric(
        "idspam_adapter_failures_total",
        Counter,
        ("adapter",),
        "Texts that got an error which is not the caller's, by adapter",
    ),
    Metric(
        "idspam_truncated_inputs_total",
        Counter,
        (),
        "Texts that were cut to their adapter's maximum length",
    ),
    Metric(
        "idspam_processes",
        Gauge,
        ("kind",),
        "Processes alive, by kind: supervisor, engine, worker (with `IDSPAM_WORKERS`)",
    ),
    Metric(
        "idspam_process_restarts_total",
        Counter,
        ("kind",),
        "Processes that ended and were replaced, by kind",
    ),
    Metric("idspam_process_resident_bytes", Gauge, ("process",), "Memory that a process holds"),
    Metric(
        "idspam_process_cpu_seconds_total",
        Counter,
        ("process",),
        "Processor time of a process and of those that it replaced",
    ),
    Metric(
        "idspam_events_dropped_total",
        Counter,
        (),
        "Events missing in other metrics, since they came too fast to be counted",
    ),
    Metric(
        "idspam_build_info",
        Gauge,
        ("version", "backbone", "device", "dtype"),
        "1, with what is running as labels",
    ),
)


def metrics_table() -> str:
    """The documentation's table, as Markdown."""
    lines = ["| Metric | Type | Labels | Meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
        lines.append(
            f"| `{metric.name}` | {metric.kind.__name__.lower()} | {labels} | {metric.help} |"
        )
    return "\n".join(lines) + "\n"
