"""What differs between two adapters, by what their files declare.

Pure: it compares specs, reads no file and needs no torch. Two files with equal specs may still have
other weights; their revisions tell.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from adapters.errors import listing
from adapters.format.spec import AdapterSpec

Value: TypeAlias = str | int | float | bool | list[Any] | None

# Shown on their own, beside the other fields.
_APART = frozenset({"labels", "thresholds", "provenance.metrics"})
# Tables of numbers: that they differ is worth a word, their numbers are not.
_TABLES = frozenset({"decision.coverage", "profile"})
_SHOWN_LABELS = 10
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class LabelChanges:
    """reordered: the labels that both have are in another order."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    reordered: bool = False

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.reordered)


@dataclass(frozen=True, slots=True)
class ValueChange:
    """One value that differs. field: its place in the spec (`prompt.length`), a label or a figure.

    None: that side has no such value.
    """

    field: str
    before: Value
    after: Value


@dataclass(frozen=True, slots=True)
class Difference:
    """Everything that differs; nothing does if it is false.

    thresholds: by label, of those that both have. fields: `kind` (as `AdapterSpec.method`), `size`
    in bytes, then the fields of the spec in its order. figures: of the training, by name. tables:
    names of the larger parts of the spec that differ.
    """

    labels: LabelChanges = LabelChanges()
    thresholds: tuple[ValueChange, ...] = ()
    fields: tuple[ValueChange, ...] = ()
    figures: tuple[ValueChange, ...] = ()
    tables: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.labels or self.thresholds or self.fields or self.figures or self.tables)

    def lines(self) -> list[str]:
        """One sentence for each difference, for people."""
        lines = []
        if self.labels.added:
            lines.append(f"labels added: {listing(self.labels.added, _SHOWN_LABELS)}")
        if self.labels.removed:
            lines.append(f"labels removed: {listing(self.labels.removed, _SHOWN_LABELS)}")
        if self.labels.reordered:
            lines.append("labels in another order")
        lines += [_line(change) for change in self.fields]
        lines += [_line(change, "threshold of ") for change in self.thresholds]
        lines += [_line(change) for change in self.figures]
        lines += [f"{name} differs" for name in self.tables]
        return lines


def difference(
    before: AdapterSpec,
    after: AdapterSpec,
    *,
    size_before: int | None = None,
    size_after: int | None = None,
) -> Difference:
    """What an adapter would change if it took another one's place.

    Args:
        size_before, size_after: bytes of their files; compared if both are given.
    """
    derived: list[tuple[str, Value, Value]] = [("kind", before.method, after.method)]
    if size_before is not None and size_after is not None:
        derived.append(("size", size_before, size_after))
    old, new = _fields(before), _fields(after)
    names = dict.fromkeys([*old, *new])
    declared = [(name, old.get(name), new.get(name)) for name in names]
    return Difference(
        labels=label_changes(before, after),
        thresholds=_changes(_thresholds(before, after)),
        fields=_changes([*derived, *(item for item in declared if item[0] not in _TABLES)]),
        figures=_changes(_figures(before, after)),
        tables=tuple(name for name, was, now in declared if name in _TABLES and was != now),
    )


def label_changes(before: AdapterSpec, after: AdapterSpec) -> LabelChanges:
    """Which labels were added and removed, and whether the others are in another order."""
    known, wanted = set(before.labels), set(after.labels)
    return LabelChanges(
        added=tuple(label for label in after.labels if label not in known),
        removed=tuple(label for label in before.labels if label not in wanted),
        reordered=[label for label in before.labels if label in wanted]
        != [label for label in after.labels if label in known],
    )


def _changes(values: list[tuple[str, Value, Value]]) -> tuple[ValueChange, ...]:
    return tuple(ValueChange(name, was, now) for name, was, now in values if was != now)


def _fields(spec: AdapterSpec) -> dict[str, Value]:
    """Every other field of a spec by its place. A missing object has no fields."""
    return dict(_flat(spec.model_dump(mode="json"), ""))


def _flat(fields: Mapping[str, Any], place: str) -> Iterator[tuple[str, Value]]:
    for name, value in fields.items():
        path = f"{place}{name}"
        if path in _APART or value is None:
            continue
        if isinstance(value, dict) and path not in _TABLES:
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _thresholds(before: AdapterSpec, after: AdapterSpec) -> list[tuple[str, Value, Value]]:
    if not (before.multi_label and after.multi_label):
        return []
    new = dict(zip(after.labels, after.label_thresholds, strict=True))
    old = zip(before.labels, before.label_thresholds, strict=True)
    return [(label, threshold, new[label]) for label, threshold in old if label in new]


def _figures(before: AdapterSpec, after: AdapterSpec) -> list[tuple[str, Value, Value]]:
    old, new = before.provenance.metrics, after.provenance.metrics
    return [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]


def _line(change: ValueChange, of: str = "") -> str:
    return f"{of}{change.field}: {_shown(change.before)} -> {_shown(change.after)}"


def _shown(value: Value) -> str:
    if value is None:
        return "none"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
