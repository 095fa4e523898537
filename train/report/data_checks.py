"""What `fit` finds out about its data: repeated rows, labels, what the tokenizer reads, suspects.

`DataChecks` is what is shown and stored; two CSV files beside the adapter list the rows. Nothing
here imports torch when it is loaded.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from adapters.errors import listing
from adapters.format.durable import write_atomically
from adapters.tokenizer import Encoding, TextEncoder
from cli.text_files import csv_row
from train.data.dataset import Dataset, Example, Label
from train.data.repeats import Repeats, dropped_rows
from train.errors import OutputError

if TYPE_CHECKING:
    from train.report.suspects import Suspect

# Of a label with fewer training rows, too little is learnt to rely on.
FEW_ROWS = 10
# A text with more unknown tokens than this share is mostly lost on the backbone.
UNREADABLE = 0.1
_SHOWN_LABELS = 5

REPEATS_HEAD = (
    "kind",
    "similarity",
    "split",
    "line",
    "label",
    "text",
    "text_pair",
    "other_split",
    "other_line",
    "other_label",
    "other_text",
    "other_text_pair",
)
SUSPECTS_HEAD = (
    "likely_wrong",
    "line",
    "label",
    "confidence",
    "suggested",
    "suggested_confidence",
    "text",
    "text_pair",
)


@dataclass(frozen=True, slots=True)
class Leak:
    """Rows of the split `judged`, of `rows`, whose text is also in the split `seen`.

    exact: with equal texts. near: with nearly equal ones only.
    """

    seen: str
    judged: str
    rows: int
    exact: int
    near: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What the tokenizer makes of the texts of a split.

    max_length: tokens of the longest text that is read whole. cut: texts that are longer. unknown:
    the share of all tokens that the tokenizer does not know. unreadable: texts with more than a
    tenth of such tokens.
    """

    texts: int
    max_length: int
    cut: int
    unknown: float
    unreadable: int

    @classmethod
    def of(cls, encodings: Sequence[Encoding], encoder: TextEncoder, max_length: int) -> Self:
        """Count in encodings that were cut to `max_length` tokens."""
        counts = [encoder.count_unknown(encoding) for encoding in encodings]
        return cls(
            texts=len(encodings),
            max_length=max_length,
            cut=sum(encoding.truncated for encoding in encodings),
            unknown=sum(unknown for unknown, _ in counts) / max(1, sum(all for _, all in counts)),
            unreadable=sum(unknown > UNREADABLE * all for unknown, all in counts),
        )


@dataclass(frozen=True, slots=True)
class DataChecks:
    """leaks: pairs of splits with rows in common. conflicts: training rows whose text has another
    label in an equal row; near_conflicts: in a nearly equal row only. dropped: rows that
    `--drop-leaks` left out, by split. few: labels with fewer than `FEW_ROWS` training rows, and how
    many. reading: by split. suspects: training rows that are probably labelled wrong; None if they
    were not looked for. files: the lists of rows that were written.
    """

    leaks: tuple[Leak, ...] = ()
    conflicts: int = 0
    near_conflicts: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    few: Mapping[str, int] = field(default_factory=dict)
    reading: Mapping[str, Reading] = field(default_factory=dict)
    suspects: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sets: Mapping[str, Dataset], repeats: Repeats, *, drop: bool) -> Self:
        """Of the rows, before a model has read them. drop: whether leaks are left out."""
        pairs = Counter((leak.other_split, leak.split, leak.exact) for leak in repeats.leaked)
        left_out = dropped_rows(repeats).get("train", set()) if drop else set()
        rows = Counter(
            label
            for row, example in enumerate(sets["train"].examples)
            if row not in left_out
            for label in example.labels
        )
        exact = sum(conflict.exact for conflict in repeats.conflicts)
        return cls(
            leaks=tuple(
                Leak(
                    seen,
                    judged,
                    len(sets[judged]),
                    pairs[seen, judged, True],
                    pairs[seen, judged, False],
                )
                for seen, judged in dict.fromkeys(pair[:2] for pair in pairs)
            ),
            conflicts=exact,
            near_conflicts=len(repeats.conflicts) - exact,
            dropped={split: len(each) for split, each in dropped_rows(repeats).items()}
            if drop
            else {},
            few={
                label: count
                for label, count in sorted(rows.items(), key=lambda each: each[1])
                if count < FEW_ROWS
            },
        )

    @property
    def found_anything(self) -> bool:
        """Whether a card has something to say about rows."""
        reading = any(each.cut or each.unreadable for each in self.reading.values())
        conflicts = self.conflicts or self.near_conflicts
        return bool(self.leaks or conflicts or self.suspects or reading)

    def of_rows(self) -> Iterator[str]:
        """Lines for people about the rows themselves; none about what is in order."""
        for leak in self.leaks:
            yield (
                f"{leak.exact + leak.near:,} of {leak.rows:,} {leak.judged} rows are also in "
                f"{leak.seen} ({leak.exact:,} the same, {leak.near:,} nearly)"
            )
        if self.conflicts or self.near_conflicts:
            yield (
                f"{self.conflicts + self.near_conflicts:,} training rows have other labels than a "
                f"row with their text ({self.conflicts:,} the same, {self.near_conflicts:,} nearly)"
            )
        if self.dropped:
            counts = (f"{count:,} {split} rows" for split, count in self.dropped.items())
            yield f"--drop-leaks left out {' and '.join(counts)}"
        elif self.leaks or self.conflicts:
            yield "--drop-leaks trains without rows that leak and equal texts with other labels"
        if self.few:
            shown = [f"{label!a} ({count})" for label, count in self.few.items()]
            names = listing(shown[:_SHOWN_LABELS])
            more = len(shown) - _SHOWN_LABELS
            yield (
                f"labels with fewer than {FEW_ROWS} training rows: "
                f"{names}{f' and {more:,} more' if more > 0 else ''}"
            )

    def of_reading(self) -> Iterator[str]:
        """Lines for people about texts that are not read well."""
        for split, reading in self.reading.items():
            texts = f"of {reading.texts:,} {split} texts"
            if reading.cut:
                yield f"{reading.cut:,} {texts} are cut to {reading.max_length} tokens"
            if reading.unreadable:
                yield (
                    f"{reading.unreadable:,} {texts} have more than a tenth of tokens that the "
                    f"tokenizer does not know ([UNK]); of all its tokens {reading.unknown:.1%}"
                )

    def of_suspects(self) -> Iterator[str]:
        """A line for people about rows that are probably labelled wrong."""
        if self.suspects:
            yield (
                f"{self.suspects:,} training rows are probably labelled wrong: "
                f"{self.files['suspects']}, most suspicious first"
            )

    def lines(self) -> Iterator[str]:
        """All of them."""
        yield from self.of_rows()
        if "repeats" in self.files:
            yield f"rows that repeat others: {self.files['repeats']}"
        yield from self.of_reading()
        yield from self.of_suspects()


def repeats_path(output: Path) -> Path:
    """The list of repeated rows of an adapter file: `x.safetensors` has `x.repeats.csv`."""
    return output.with_suffix(".repeats.csv")


def suspects_path(output: Path) -> Path:
    """The ranked training rows of an adapter file: `x.safetensors` has `x.suspects.csv`."""
    return output.with_suffix(".suspects.csv")


def check_lists(output: Path) -> None:
    """
    Raises:
        OutputError: a list would replace a file that is none.
    """
    for path, head in (
        (repeats_path(output), REPEATS_HEAD),
        (suspects_path(output), SUSPECTS_HEAD),
    ):
        if path.is_dir() or (path.exists() and not _is_list(path, head)):
            raise OutputError(
                f"{path} is not a list of rows by fit and would be replaced by that of {output}: "
                "rename one of the two"
            )


def write_repeats(output: Path, sets: Mapping[str, Dataset], repeats: Repeats) -> str | None:
    """Write every leak and conflict; without any, remove the list of an earlier run.

    Returns:
        the file's name; None if there is nothing to list.
    """
    path = repeats_path(output)
    found = [("leak", leak) for leak in repeats.leaks]
    found += [("conflict", conflict) for conflict in repeats.conflicts]
    if not found:
        path.unlink(missing_ok=True)
        return None
    rows = (
        (
            f"{kind}, same text" if repeat.exact else kind,
            f"{repeat.similarity:.3f}",
            *_cells(repeat.split, sets[repeat.split].examples[repeat.row]),
            *_cells(repeat.other_split, sets[repeat.other_split].examples[repeat.other_row]),
        )
        for kind, repeat in found
    )
    _write(path, REPEATS_HEAD, rows)
    return str(path)


def write_suspects(
    output: Path, train: Dataset, labels: Sequence[str], suspects: Sequence["Suspect"]
) -> str:
    """Write all training rows, most suspicious first; returns the file's name."""
    path = suspects_path(output)
    rows = []
    for suspect in suspects:
        example = train.examples[suspect.row]
        answer = tuple(labels[index] for index in suspect.suggested)
        rows.append(
            (
                "yes" if suspect.likely else "no",
                example.line,
                label_cell(example.label),
                f"{suspect.confidence:.4f}",
                label_cell(answer if train.multi_label else answer[0]),
                f"{suspect.other:.4f}",
                example.text,
                example.text_pair or "",
            )
        )
    _write(path, SUSPECTS_HEAD, rows)
    return str(path)


def label_cell(label: Label) -> str:
    """A label, or a set of labels as a JSON list, in a cell of CSV."""
    return label if isinstance(label, str) else json.dumps(label, ensure_ascii=False)


def _cells(split: str, example: Example) -> tuple[object, ...]:
    label = label_cell(example.label)
    return split, example.line, label, example.text, example.text_pair or ""


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    write_atomically(path, "".join(map(csv_row, (head, *rows))).encode())


def _is_list(path: Path, head: Sequence[str]) -> bool:
    with path.open("rb") as file:
        return file.readline(4096) == (",".join(head) + "\n").encode()
