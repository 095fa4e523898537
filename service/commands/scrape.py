"""Two scrapes of /metrics, and what happened in between. Knows no service and no terminal.

A counter that has fallen began anew: what it shows is what it has counted since. A series that is
new began at nothing.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client.parser import text_string_to_metric_families

Labels: TypeAlias = frozenset[tuple[str, str]]
_BUCKET = "_bucket"


class NoMetrics(Exception):
    """This is not Prometheus' text format."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """seconds: when, on any clock that only moves on. series: values by name and labels."""

    seconds: float
    series: Mapping[str, Mapping[Labels, float]]

    def values(self, name: str, label: str) -> dict[str, float]:
        """A metric by one of its labels, summed over the others."""
        return _by(label, self.series.get(name, {}).items())

    def total(self, name: str) -> float:
        return sum(self.series.get(name, {}).values())

    def labels(self, name: str) -> dict[str, str]:
        """Those of a metric's first series that is not zero."""
        for labels, value in self.series.get(name, {}).items():
            if value:
                return dict(labels)
        return {}


def parse(text: str, *, seconds: float) -> Scrape:
    """
    Raises:
        NoMetrics: it cannot be read.
    """
    series: dict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series[sample.name][frozenset(sample.labels.items())] = sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise NoMetrics(f"no metrics of this service: {error}") from None
    if not any(name.startswith("idspam_") for name in series):
        raise NoMetrics("no metrics of this service")
    return Scrape(seconds, series)


@dataclass(frozen=True, slots=True)
class Between:
    """What happened from one scrape to a later one."""

    before: Scrape
    now: Scrape

    @property
    def seconds(self) -> float:
        return max(self.now.seconds - self.before.seconds, 1e-9)

    def increases(self, name: str) -> dict[Labels, float]:
        """Of a counter, by its labels."""
        old = self.before.series.get(name, {})
        return {
            labels: _increase(old.get(labels, 0.0), value)
            for labels, value in self.now.series.get(name, {}).items()
        }

    def rate(self, name: str) -> float:
        """A second, over all labels."""
        return sum(self.increases(name).values()) / self.seconds

    def rates(self, name: str, label: str) -> dict[str, float]:
        """A second, by one label."""
        found = _by(label, self.increases(name).items())
        return {key: value / self.seconds for key, value in found.items()}

    def mean(self, histogram: str) -> float:
        """Of what was observed; NaN: nothing was."""
        count = self.rate(f"{histogram}_count")
        return self.rate(f"{histogram}_sum") / count if count else math.nan

    def quantile(
        self, histogram: str, share: float, *, without: Collection[tuple[str, str]] = ()
    ) -> float:
        """Of what was observed, between its bucket's bounds as if evenly spread; NaN: nothing was.

        What is over the last bound counts as that bound.

        Args:
            without: series that have one of these labels are left out.
        """
        counts: dict[float, float] = defaultdict(float)
        for labels, value in self.increases(histogram + _BUCKET).items():
            if not labels.intersection(without):
                counts[float(dict(labels)["le"])] += value
        return _quantile(sorted(counts.items()), share)


def _quantile(cumulative: list[tuple[float, float]], share: float) -> float:
    if not cumulative or not (total := cumulative[-1][1]):
        return math.nan
    rank = share * total
    low = below = 0.0
    for high, count in cumulative:
        if count >= rank:
            if math.isinf(high):
                return low
            inside = count - below
            return high if inside <= 0 else low + (high - low) * (rank - below) / inside
        low, below = high, count
    return low


def _increase(before: float, now: float) -> float:
    return now if now < before else now - before


def _by(label: str, items: Iterable[tuple[Labels, float]]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for labels, value in items:
        found[dict(labels).get(label, "")] += value
    return dict(found)
