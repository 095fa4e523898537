"""Counts what adapters are asked, and compares it with the profiles in their files.

It counts in the process that has the engine, so there is one count however many processes answer.
Only revisions that answer a name alone are counted: the current one, and one that is tried beside
it, each by itself. A request that pins another revision is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from heapq import nsmallest
from time import time

from adapters.format.profile import Profile
from adapters.format.spec import AdapterSpec
from adapters.profiles import QUANTITIES, Bins, Quantity, counts_of
from service.drift.interface import Bin, DriftReport, QuantityShift
from service.drift.shift import LEVELS, Shift, shift_of
from service.drift.uncertain import UncertainTexts, certainty_of
from service.drift.window import Window
from service.engine.answers import AnswerListener
from service.engine.interface import AdapterKey, Entry, RowResult
from service.engine.observer import Observer

# A comparison of fewer texts says nothing.
LEAST_TEXTS = 100
# So often in the time of a window the metrics are worked out again.
_REPORTS = 16
NO_LABEL, ABSTAINED, OTHERS = "(none)", "(abstained)", "(others)"
OFF = "IDSPAM_DRIFT_TEXTS is 0: nothing is counted"
NO_PROFILE = "the adapter's file has no profile; `python -m train profile` adds one"
NOT_COUNTED = "only the current revision and one that is tried beside it are counted"


@dataclass(slots=True, eq=False)
class _Counted:
    """What is counted of a profile's adapter. due: texts until the metrics are worked out again."""

    profile: Profile
    bins: Bins
    window: Window
    due: int = LEAST_TEXTS


@dataclass(slots=True, eq=False)
class _Revision:
    """counted: None if its file has no profile, or nothing is counted."""

    spec: AdapterSpec
    counted: _Counted | None


class DriftMonitor(AnswerListener):
    """All counts of this process.

    Args:
        texts: the most of a revision that are counted; 0: none are.
        uncertain: keeps texts of low confidence.

    Attributes:
        unknown_id: of the tokenizer, once it is loaded.
    """

    def __init__(self, observer: Observer, *, texts: int, uncertain: UncertainTexts) -> None:
        self.unknown_id: int | None = None
        self.uncertain = uncertain
        self._began = iso(time())
        self._observer = observer
        self._texts = texts
        # By name: the current revision, and the specs of those that are counted.
        self._current: dict[str, str | None] = {}
        self._followed: dict[str, Mapping[str, AdapterSpec]] = {}
        # Made with a revision's first text: most of ten thousand adapters may rest.
        self._revisions: dict[AdapterKey, _Revision] = {}
        # Names that have metrics.
        self._shown: set[str] = set()

    def follow(self, name: str, current: str | None, specs: Mapping[str, AdapterSpec]) -> None:
        """The revisions that answer a name's texts now; none once it is deleted. Those of before
        are forgotten, with their texts."""
        for revision in self._followed.get(name, {}):
            if revision not in specs:
                self._revisions.pop(AdapterKey(name, revision), None)
        self.uncertain.forget(name, but=tuple(specs))
        before = self._current.get(name)
        if specs:
            self._current[name], self._followed[name] = current, specs
        else:
            self._current.pop(name, None)
            self._followed.pop(name, None)
        if before == current and specs:
            return
        if name in self._shown:
            self._shown.discard(name)
            self._observer.drifted(name, 0, ())
        if current is not None and (known := self._revisions.get(AdapterKey(name, current))):
            self._show(name, known)

    def answered(self, entries: Sequence[Entry], rows: Sequence[RowResult]) -> tuple[int, ...]:
        keeps = self.uncertain.most > 0
        if not self._texts and not keeps:
            return ()
        wanted: dict[str, list[tuple[float, int]]] = {}
        for index, (entry, row) in enumerate(zip(entries, rows, strict=True)):
            if not entry.counted:
                continue
            key = entry.adapter
            revision = self._revisions.get(key) or self._begin(key)
            if revision is None:
                continue
            if (counted := revision.counted) is not None:
                bins = counted.bins.of_text(row.scores, entry.encoding.input_ids)
                self._add(key, bins)
            if keeps:
                certainty = certainty_of(revision.spec, row.scores)
                if self._wants(key, certainty):
                    wanted.setdefault(key.name, []).append((certainty, index))
        most = self.uncertain.most
        return tuple([index for of in wanted.values() for _, index in nsmallest(most, of)])

    def count(self, key: AdapterKey, bins: Sequence[int]) -> None:
        """Count a text that another engine has answered. bins: as of `Bins.of_text`."""
        revision = self._revisions.get(key) or self._begin(key)
        if revision is None or (counted := revision.counted) is None:
            return
        if all(0 <= at < counted.bins.starts[-1] for at in bins):
            self._add(key, bins)

    def _add(self, key: AdapterKey, bins: Sequence[int]) -> None:
        """Count a text of a revision that has begun to be counted."""
        revision = self._revisions[key]
        counted = revision.counted
        assert counted is not None
        counted.window.add(bins, time())
        counted.due -= 1
        if counted.due <= 0:
            counted.due = max(LEAST_TEXTS, self._texts // _REPORTS)
            if key.revision == self._current.get(key.name):
                self._show(key.name, revision)

    def _wants(self, key: AdapterKey, certainty: float) -> bool:
        return self.uncertain.wants(key.name, certainty)

    def follows(self, key: AdapterKey) -> bool:
        """Whether this revision is counted."""
        return key.revision in self._followed.get(key.name, {})

    def report(self, name: str, revision: str) -> DriftReport:
        """What is known of a revision at this moment."""
        spec = self._followed.get(name, {}).get(revision)
        known = self._revisions.get(AdapterKey(name, revision))
        profile = None if spec is None else spec.profile
        counted = None if known is None else known.counted
        texts = 0 if counted is None else counted.window.texts
        since = None if counted is None else counted.window.since
        note: str | None = None
        if spec is None:
            note = NOT_COUNTED
        elif profile is None:
            note = NO_PROFILE
        elif not self._texts:
            note = OFF
        elif texts < LEAST_TEXTS:
            note = (
                f"{texts} texts so far; a comparison needs {LEAST_TEXTS}, and each start of the "
                "engine begins at zero"
            )
        quantities: tuple[QuantityShift, ...] = ()
        if note is None and spec is not None and counted is not None:
            quantities = tuple(
                _described(spec, counted, quantity, shift)
                for quantity, shift in _shifts(counted).items()
            )
        return DriftReport(
            adapter=name,
            revision=revision,
            texts=texts,
            since=None if since is None else iso(since),
            counting_since=self._began,
            reference_texts=0 if profile is None else profile.rows,
            quantities=quantities,
            note=note,
        )

    def _begin(self, key: AdapterKey) -> _Revision | None:
        """Count a revision from now on, if it is followed."""
        spec = self._followed.get(key.name, {}).get(key.revision)
        if spec is None:
            return None
        counted = None
        if spec.profile is not None and self._texts:
            bins = Bins.of_profile(spec, spec.profile, self.unknown_id)
            counted = _Counted(spec.profile, bins, Window(bins.starts[-1], self._texts))
        revision = self._revisions[key] = _Revision(spec, counted)
        return revision

    def _show(self, name: str, revision: _Revision) -> None:
        """Report the metrics of a name's current revision."""
        counted = revision.counted
        if counted is None or counted.window.texts < LEAST_TEXTS:
            return
        shifts = _shifts(counted)
        self._shown.add(name)
        self._observer.drifted(
            name,
            counted.window.texts,
            [
                (quantity, round(shift.psi, 6), LEVELS.index(shift.level))
                for quantity, shift in shifts.items()
            ],
        )


def _shifts(counted: _Counted) -> dict[Quantity, Shift]:
    reference, seen = counts_of(counted.profile), counted.window.counts()
    starts = counted.bins.starts
    return {
        quantity: shift_of(
            reference[quantity], seen[starts[at] : starts[at + 1]], ordered=quantity != "label"
        )
        for at, quantity in enumerate(QUANTITIES)
    }


def _described(
    spec: AdapterSpec, counted: _Counted, quantity: Quantity, shift: Shift
) -> QuantityShift:
    names = _names(spec, counted.profile, quantity, shift.groups)
    return QuantityShift(
        quantity=quantity,
        psi=round(shift.psi, 6),
        chance=round(shift.chance, 6),
        level=shift.level,
        bins=tuple(
            Bin(name, round(reference, 6), round(seen, 6))
            for name, reference, seen in zip(names, shift.reference, shift.seen, strict=True)
        ),
    )


def _names(
    spec: AdapterSpec, profile: Profile, quantity: Quantity, groups: Sequence[Sequence[int]]
) -> list[str]:
    """What people call the bins of each group."""
    if quantity == "label":
        labels = (*spec.labels, NO_LABEL if spec.multi_label else ABSTAINED)
        return [labels[group[0]] if len(group) == 1 else OTHERS for group in groups]
    histogram = {
        "confidence": profile.confidence,
        "length": profile.length,
        "unknown": profile.unknown,
    }[quantity]
    edges = histogram.edges
    names = []
    for group in groups:
        low = edges[group[0] - 1] if group[0] else None
        high = edges[group[-1]] if group[-1] < len(edges) else None
        names.append(_span(quantity, low, high))
    return names


def _span(quantity: Quantity, low: float | None, high: float | None) -> str:
    """A range of values; None: it has no end."""

    def shown(value: float) -> str:
        return f"{100 * value:g} %" if quantity == "unknown" else f"{value:g}"

    if low is None:
        return "all" if high is None else f"under {shown(high)}"
    if high is None:
        return f"{shown(low)} and more"
    if quantity == "length":
        # Whole numbers: the last one that belongs to the bin.
        return shown(low) if low == high - 1 else f"{shown(low)} to {shown(high - 1)}"
    return f"{shown(low)} to {shown(high)}"


def iso(seconds: float) -> str:
    """A time since the epoch as text, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
