"""The table of a chaos run."""

from collections.abc import Sequence

from chaos.faults import Row

_HEAD = (
    "| fault | workers | times | in flight | right | refused | cut | not connected | wrong | lost "
    "| seconds to recover |"
)


def table(rows: Sequence[Row]) -> str:
    """In Markdown, with a row for each fault and their sums."""
    lines = [_HEAD, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.skipped:
            lines.append(f"| {row.fault} | {row.workers} | {row.note} | | | | | | | | |")
            continue
        recovery = _range(row.recovery) + ("" if not row.complaints else " FAILED")
        lines.append(_line(f"{row.fault}{_note(row)}", str(row.workers), [row], recovery))
    lines.append(_line("**all**", "", [row for row in rows if not row.skipped], ""))
    return "\n".join(lines)


def passed(rows: Sequence[Row]) -> bool:
    """Whether nothing was wrong or lost, and the service recovered every time."""
    return not any(row.complaints for row in rows)


def _line(fault: str, workers: str, rows: Sequence[Row], recovery: str) -> str:
    def total(*outcomes: str) -> int:
        return sum(row.counts.get(outcome, 0) for row in rows for outcome in outcomes)  # type: ignore[call-overload]  # names of outcomes

    cells = [
        fault,
        workers,
        sum(row.times for row in rows),
        sum(row.in_flight for row in rows),
        total("right"),
        total("refused"),
        total("cut"),
        total("unconnected"),
        total("wrong"),
        total("lost"),
        recovery,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _note(row: Row) -> str:
    return f" ({row.note})" if row.note else ""


def _range(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    low, high = min(seconds), max(seconds)
    return f"{high:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
