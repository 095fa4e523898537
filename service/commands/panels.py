"""What `top` shows, as plain rows of two scrapes. Knows no terminal's size and no service."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.commands.scrape import Between
from service.routes.auth import OPEN_PATHS

# Probes and pages classify nothing.
_ASIDE = frozenset(("route", path) for path in OPEN_PATHS)
STAGES: Mapping[str, str] = {
    "tokenize": "idspam_tokenize_seconds",
    "queue": "idspam_queue_seconds",
    "inference": "idspam_inference_seconds",
}
_SHOWN_LABELS = 4


@dataclass(frozen=True, slots=True)
class Panel:
    """A heading and rows of cells."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def panels_of(between: Between, *, adapters: int) -> list[Panel]:
    """Everything, from traffic to processes.

    Args:
        adapters: how many of the busiest are shown.
    """
    return [
        _traffic(between),
        _latency(between),
        _batches(between),
        _tiers(between),
        _busiest(between, adapters),
        _processes(between),
    ]


def running(between: Between) -> str:
    """`0.5.0, all-MiniLM-L6-v2, cpu, bfloat16`, once the engine runs."""
    found = between.now.labels("idspam_build_info")
    return ", ".join(
        found[key] for key in ("version", "backbone", "device", "dtype") if key in found
    )


def _traffic(between: Between) -> Panel:
    outcomes = between.rates("idspam_requests_total", "outcome")
    errors = between.rates("idspam_request_errors_total", "type")
    shown = {"requests": sum(outcomes.values()), "texts": _texts(between)}
    shown |= {name: rate for name, rate in outcomes.items() if rate and name != "success"}
    shown |= {f"error {name}": rate for name, rate in errors.items() if rate}
    return Panel(
        "traffic", ("", "a second"), [[name, number(rate)] for name, rate in shown.items()]
    )


def _texts(between: Between) -> float:
    return between.rate("idspam_predictions_total")


def _latency(between: Between) -> Panel:
    rows = [["request", *_quantiles(between, "idspam_request_seconds")]]
    rows += [[stage, *_quantiles(between, name)] for stage, name in STAGES.items()]
    return Panel("latency, ms", ("", "p50", "p99"), rows)


def _quantiles(between: Between, histogram: str) -> list[str]:
    return [
        number(between.quantile(histogram, share, without=_ASIDE) * 1e3) for share in (0.5, 0.99)
    ]


def _batches(between: Between) -> Panel:
    rows = [["a second", number(between.rate("idspam_batch_rows_count"))]]
    rows += [
        [f"{what} a batch", number(between.mean(f"idspam_batch_{what}"))]
        for what in ("rows", "tokens", "adapters")
    ]
    rows.append(["waiting tokens", number(between.now.total("idspam_waiting_tokens"))])
    return Panel("batches", ("", ""), rows)


def _tiers(between: Between) -> Panel:
    now = between.now
    held, size = (now.values(f"idspam_tier_{what}", "tier") for what in ("adapters", "bytes"))
    loads, evictions = (
        between.rates(f"idspam_adapter_{what}_total", "tier") for what in ("loads", "evictions")
    )
    # What is stored neither loads nor leaves.
    rows = [
        [
            tier,
            number(held.get(tier, 0.0)),
            mebibytes(size.get(tier, 0.0)),
            number(loads.get(tier, math.nan)),
            number(evictions.get(tier, math.nan)),
        ]
        for tier in ("stored", "registered", "active")
    ]
    return Panel("tiers", ("", "adapters", "MiB", "loads/s", "evictions/s"), rows)


def _busiest(between: Between, adapters: int) -> Panel:
    by_adapter: dict[str, dict[str, float]] = defaultdict(dict)
    for labels, texts in between.increases("idspam_predictions_total").items():
        of = dict(labels)
        if texts:
            by_adapter[of["adapter"]][of["label"]] = texts
    sums = {name: sum(labels.values()) for name, labels in by_adapter.items()}
    total = sum(sums.values())
    busiest = sorted(sums, key=lambda name: (-sums[name], name))[:adapters]
    rows = [
        [
            name,
            number(sums[name] / between.seconds),
            percent(sums[name] / total),
            _shares(by_adapter[name], sums[name]),
        ]
        for name in busiest
    ]
    if more := len(sums) - len(busiest):
        rows.append([f"and {more} more", "", "", ""])
    return Panel("busiest adapters", ("", "texts/s", "share", "labels"), rows)


def _shares(labels: Mapping[str, float], total: float) -> str:
    """`ham 81%, spam 19%`, the most frequent first."""
    order = sorted(labels, key=lambda label: (-labels[label], label))
    parts = [f"{label} {percent(labels[label] / total)}" for label in order[:_SHOWN_LABELS]]
    if more := len(order) - len(parts):
        parts.append(f"{more} more")
    return ", ".join(parts)


def _processes(between: Between) -> Panel:
    """Those behind a supervisor by their names, or the one that there is."""
    held = between.now.values("idspam_process_resident_bytes", "process")
    used = between.rates("idspam_process_cpu_seconds_total", "process")
    if not held:
        held = {"service": between.now.total("process_resident_memory_bytes")}
        used = {"service": between.rate("process_cpu_seconds_total")}
    restarts = between.now.values("idspam_process_restarts_total", "kind")
    rows = [
        [name, mebibytes(size), percent(used.get(name, math.nan)), _restarts(name, restarts)]
        for name, size in held.items()
    ]
    return Panel("processes", ("", "MiB", "of a core", "restarts of its kind"), rows)


def _restarts(process: str, restarts: Mapping[str, float]) -> str:
    """worker-3 is of the kind worker."""
    return number(restarts.get(process.partition("-")[0], math.nan))


def number(value: float) -> str:
    """`1,234`, `12.3`, `0.045`: three digits are enough to read at a glance."""
    if math.isnan(value):
        return "-"
    if value == 0 or value >= 100 or (value == int(value) and value >= 1):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f}"
