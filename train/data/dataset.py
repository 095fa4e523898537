"""Labelled texts: examples and data sets, how they are read, checked and split."""

import hashlib
import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias

from adapters.errors import listing
from adapters.format.spec import label_fault
from cli.text_files import Columns
from train.data.hf_datasets import PREFIX, HubName, read_hub
from train.data.label_sets import hold_out_texts
from train.data.readers import reader_of
from train.errors import DataError, SettingsError

TEXT_COLUMN = "text"
TEXT_PAIR_COLUMN = "text_pair"
LABEL_COLUMN = "label"

# The limits of `adapters.format.spec`, checked here so that no training ends in a refused file.
MAX_LABELS = 4096
MAX_LABEL_LENGTH = 256

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
# Soft hyphen, zero-width space, word joiner, byte order mark: none of them shows inside a word.
_INVISIBLE = dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF))

# Characters of a cell in a message.
_SHOWN = 64
# Letters, digits and quotes belong to labels, these three to numbers.
_NO_SEPARATORS = "\"'.+-"

# A text, or a pair of texts.
Text: TypeAlias = tuple[str, str | None]
# One label; or, where a text may have several or none, all of them, sorted and distinct.
Label: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text, or pair of texts. line: in its file or hub data set; 0 if unknown."""

    text: str
    text_pair: str | None
    label: Label
    line: int = field(default=0, compare=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """All its labels, however many it may have."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def texts(self) -> Text:
        """The example without its label."""
        return self.text, self.text_pair


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples and their origin. There is at least one; all of them are pairs, or none is, and all
    of them have one label, or all have a set of labels.

    source: path or hub name. sha256: of the file's bytes, or of the rows of a hub data set.
    """

    source: str
    sha256: str
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> tuple[str, ...]:
        """Distinct labels of all examples, sorted: the order of the rows does not matter.

        By value if all of them are numbers, else as strings.
        """
        labels = sorted({label for example in self.examples for label in example.labels})
        if all(_NUMBER.fullmatch(label) for label in labels):
            labels.sort(key=Decimal)
        return tuple(labels)

    @property
    def multi_label(self) -> bool:
        """Whether an example has a set of labels, perhaps empty, and not one."""
        return not isinstance(self.examples[0].label, str)

    @property
    def paired(self) -> bool:
        """Whether the examples are pairs."""
        return self.examples[0].text_pair is not None


def read_examples(
    source: str,
    *,
    text_column: str = TEXT_COLUMN,
    text_pair_column: str | None = None,
    label_column: str = LABEL_COLUMN,
    label_separator: str | None = None,
    split: str = "train",
) -> Dataset:
    """Read a whole data set.

    Args:
        source: a file, or `hub:name[:config][@split]`; `hub:` may be left out if there is no such
            file.
        text_pair_column: None: the column `text_pair` if there is one.
        label_separator: between the labels of a text, where they are one string, as in CSV. None:
            such a string is one label. Lists, as in JSONL, need none.
        split: of a hub data set whose name has none; files have no splits.

    Raises:
        DataError: missing, empty, unreadable or broken input; names the file and the line.
        SettingsError: the separator is not one character that may separate labels.
    """
    columns, convert = _interpretation(
        source, text_column, text_pair_column, label_column, label_separator
    )
    path = None if is_hub_name(source) else _existing(source)
    if path is None:
        rows = read_hub(HubName.parse(source, split=split), columns, source=source)
    else:
        rows = reader_of(path)(path, columns)
    examples = tuple(convert(number, values) for number, values in rows)
    return dataset_of(source, examples, sha256=None if path is None else _file_sha256(path))


def dataset_of(source: str, examples: Sequence[Example], *, sha256: str | None) -> Dataset:
    """A data set. sha256: None: of the rows.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("holds no rows", source=source)
    return Dataset(source, sha256 or rows_sha256(examples), tuple(examples))


class LabelCheck:
    """Refuses a label that an adapter cannot have, and a second spelling of an earlier one.

    Args:
        source: path or hub name, for messages.
        column: that has the labels.
    """

    def __init__(self, source: str, column: str) -> None:
        self._source, self._column = source, column
        self._known: set[str] = set()
        self._first: dict[str | Decimal, tuple[str, int]] = {}

    def __call__(self, label: str, line: int) -> None:
        """
        Raises:
            DataError: names the label, and the earlier one that it could be taken for.
        """
        # A million rows have a handful of labels.
        if label in self._known:
            return
        if not label.strip():
            raise self._error(f"{self._column!r} is empty", line)
        if len(label) > MAX_LABEL_LENGTH:
            raise self._error(
                f"{self._column!r} has {len(label):,} characters, at most {MAX_LABEL_LENGTH} are "
                "possible: is this the right column?",
                line,
            )
        if (fault := label_fault(label)) is not None:
            raise self._error(f"{self._column!r}: {fault}", line)
        meaning = _meaning(label)
        first, first_line = self._first.setdefault(meaning, (label, line))
        if first != label:
            likeness = "is the same number as" if isinstance(meaning, Decimal) else "looks like"
            raise self._error(
                f"label {label!a} {likeness} {first!a} at {self._source}:{first_line}: "
                "write them the same way, or rename one",
                line,
            )
        self._known.add(label)

    def _error(self, message: str, line: int) -> DataError:
        return DataError(message, source=self._source, line=line)


class _Converter:
    """Converts rows to examples and refuses the first row that cannot be one.

    Args:
        source: path or hub name, for messages.
        text, pair, label: names of the columns; `pair` is None for single texts.
        separator: between several labels in one string.
        paired: whether rows have a second text; None: as the first row.
    """

    def __init__(
        self,
        source: str,
        *,
        text: str,
        pair: str | None,
        label: str,
        separator: str | None,
        paired: bool | None,
    ) -> None:
        self._source = source
        self._text, self._pair, self._label = text, pair, label
        self._separator = separator
        self._paired = paired
        # Whether labels are lists, and the first row, which decides it.
        self._lists: tuple[bool, int] | None = None
        self._check_label = LabelCheck(source, label)

    def __call__(self, line: int, values: Mapping[str, object]) -> Example:
        text = self._string(line, self._text, values[self._text])
        pair = self._pair_of(line, values)
        return Example(text, pair, self._labels_of(line, values[self._label]), line)

    def _pair_of(self, line: int, values: Mapping[str, object]) -> str | None:
        if self._pair is None:
            return None
        pair = values.get(self._pair)
        # CSV has no null: an empty second text means that there is none.
        has_pair = not _is_missing(pair) and pair != ""
        if self._paired is None:
            self._paired = has_pair
        if self._paired and not has_pair:
            raise self._error(f"{self._pair!r} is missing or empty, but other rows have one", line)
        if has_pair and not self._paired:
            raise self._error(f"{self._pair!r} is given, but the rows before have none", line)
        return self._string(line, self._pair, pair) if has_pair else None

    def _labels_of(self, line: int, value: object) -> Label:
        is_list = isinstance(value, list | tuple)
        if self._lists is None:
            self._lists = is_list, line
        if is_list != self._lists[0]:
            kinds = {True: "a list", False: "no list"}
            raise self._error(
                f"{self._label!r} is {kinds[is_list]}, but {kinds[not is_list]} at "
                f"{self._source}:{self._lists[1]}: give every row a list, or none",
                line,
            )
        if isinstance(value, list | tuple):
            labels = [self._label_of(line, part) for part in value]
            self._refuse_separator(labels, line)
        elif self._separator is not None:
            labels = [self._label_of(line, part) for part in self._split(line, value)]
        else:
            return self._label_of(line, value)
        if repeated := [label for label, count in Counter(labels).items() if count > 1]:
            raise self._error(f"{self._label!r} has {repeated[0]!a} twice", line)
        return tuple(sorted(labels))

    def _refuse_separator(self, labels: Sequence[str], line: int) -> None:
        """A label that holds the separator could not be told from two labels in a CSV."""
        for label in labels:
            if self._separator is not None and self._separator in label:
                raise self._error(f"label {label!a} holds the separator {self._separator!r}", line)

    def _split(self, line: int, value: object) -> list[str]:
        """The labels in one string, without spaces around them; an empty string has none."""
        separator, text = self._separator, self._string(line, self._label, value)
        text = text.strip()
        if not text:
            return []
        parts = [part.strip() for part in text.split(separator)]
        if not all(parts):
            raise self._error(
                f"{self._label!r} is {text[:_SHOWN]!a}: {separator!r} with no label beside it", line
            )
        return parts

    def _label_of(self, line: int, value: object) -> str:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int):
            value = str(value)
        if isinstance(value, float) and math.isfinite(value):
            raise self._error(
                f"{self._label!r} is {value!r}: labels are names or whole numbers", line
            )
        label = self._string(line, self._label, value)
        self._check_label(label, line)
        # A million rows share a handful of strings.
        return sys.intern(label)

    def _string(self, line: int, column: str, value: object) -> str:
        if _is_missing(value):
            raise self._error(f"{column!r} is missing (null)", line)
        if not isinstance(value, str):
            raise self._error(
                f"{column!r} is of type {type(value).__name__}, expected a string", line
            )
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self._error(f"{column!r} holds half of a surrogate pair", line) from None
        return value

    def _error(self, message: str, line: int) -> DataError:
        return DataError(message, source=self._source, line=line)


def _meaning(label: str) -> str | Decimal:
    """The same for labels that a reader cannot tell apart, and for spellings of one number."""
    shown = unicodedata.normalize("NFC", " ".join(label.translate(_INVISIBLE).split()))
    return Decimal(shown) if _NUMBER.fullmatch(shown) else shown


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _interpretation(
    source: str, text: str, pair: str | None, label: str, separator: str | None
) -> tuple[Columns, _Converter]:
    """The columns to read, and the converter of their rows."""
    if separator is not None and not is_separator(separator):
        raise SettingsError(
            [
                f"--label-separator {separator!a}: expected one character, "
                "no letter, digit, quote, line break or one of . + -"
            ]
        )
    required = (text, label) if pair is None else (text, pair, label)
    if len(set(required)) < len(required):
        raise DataError(f"the same column is asked for twice: {listing(required)}", source=source)
    optional = () if TEXT_PAIR_COLUMN in required or pair is not None else (TEXT_PAIR_COLUMN,)
    pair_column = pair or next(iter(optional), None)
    convert = _Converter(
        source,
        text=text,
        pair=pair_column,
        label=label,
        separator=separator,
        paired=True if pair else None,
    )
    return Columns(required, optional), convert


def is_separator(text: str) -> bool:
    """Whether a text may separate labels."""
    if len(text) != 1 or text.isalnum() or text in _NO_SEPARATORS:
        return False
    return text.isprintable() or text == "\t"


def is_hub_name(source: str) -> bool:
    """Whether a source is `hub:...`, or neither an existing file nor named like one."""
    if source.startswith(PREFIX):
        return True
    path = Path(source)
    return not path.exists() and not path.suffix and not source.startswith(("/", ".", "~"))


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise DataError("no such file", source=source)
    if not path.is_file():
        raise DataError(
            "a folder, expected a file" if path.is_dir() else "not a regular file", source=source
        )
    if path.stat().st_size == 0:
        raise DataError("the file is empty", source=source)
    return path


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_sha256(examples: Sequence[Example]) -> str:
    """A hash of the rows, for data that does not come from a local file."""
    digest = hashlib.sha256()
    for example in examples:
        row = (example.text, example.text_pair, example.label)
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def check_trainable(train: Dataset, *, label_separator: str | None = None) -> None:
    """
    Args:
        label_separator: with which it was read.

    Raises:
        DataError: nothing to tell apart, more labels than an adapter can have, or a separator that
            separates nothing.
    """
    labels = train.labels
    if train.multi_label:
        _check_sets(train, label_separator)
    elif len(labels) == 1:
        raise DataError(
            f"all {len(train):,} rows have the label {labels[0]!r}; at least two are needed",
            source=train.source,
        )
    if len(labels) > MAX_LABELS:
        raise DataError(
            f"{len(labels):,} different labels, at most {MAX_LABELS} are possible: "
            "is this the right column?",
            source=train.source,
        )


def _check_sets(train: Dataset, separator: str | None) -> None:
    rows = f"all {len(train):,} rows have"
    if not train.labels:
        raise DataError(f"{rows} no label; at least one is needed", source=train.source)
    if len({example.label for example in train.examples}) == 1:
        shown = listing([repr(label) for label in train.labels])
        raise DataError(f"{rows} the same labels: {shown}", source=train.source)
    if separator is not None and all(len(example.labels) <= 1 for example in train.examples):
        raise DataError(
            f"no row has two labels with {separator!r} between them: is that the separator?",
            source=train.source,
        )


def check_labels(dataset: Dataset, known: Sequence[str], *, known_to: str) -> None:
    """
    Args:
        known_to: the owner of the known labels, for the message: a path.

    Raises:
        DataError: names the labels that are not known.
    """
    unknown = sorted(set(dataset.labels) - set(known))
    if unknown:
        spellings = {_meaning(label): label for label in known}
        names = [
            f"{label!a} (it has {other!a})"
            if (other := spellings.get(_meaning(label)))
            else repr(label)
            for label in unknown
        ]
        raise DataError(
            f"labels that {known_to} does not have: {listing(names)}", source=dataset.source
        )


def check_label_kind(dataset: Dataset, *, multi_label: bool, known_to: str) -> None:
    """
    Args:
        multi_label: whether `known_to` has sets of labels.

    Raises:
        DataError: one of them has sets of labels and the other one label a text.
    """
    if dataset.multi_label != multi_label:
        kinds = {True: "several labels a text", False: "one label a text"}
        help = "" if dataset.multi_label else " (labels in one string need --label-separator)"
        raise DataError(
            f"has {kinds[dataset.multi_label]}, {known_to} has {kinds[multi_label]}{help}",
            source=dataset.source,
        )


def check_same_task(train: Dataset, other: Dataset) -> None:
    """Refuse a validation or test set that does not belong to the training set.

    Raises:
        DataError: unknown labels, one label where there are sets of them, or texts where there are
            pairs.
    """
    check_label_kind(other, multi_label=train.multi_label, known_to=train.source)
    check_labels(other, train.labels, known_to=train.source)
    if train.paired != other.paired:
        kinds = {True: "pairs of texts", False: "single texts"}
        raise DataError(
            f"holds {kinds[other.paired]}, {train.source} holds {kinds[train.paired]}",
            source=other.source,
        )


def split_validation(dataset: Dataset, *, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold rows out for validation: the same share of every label, as near as whole texts allow.

    Equal texts stay together. Every label keeps a text in the training part, and texts that other
    rows label differently stay there. Sets of labels are divided by iterative stratification
    (`hold_out_texts`). Both parts keep the order of the rows; the same seed gives the same parts.

    Returns:
        training and validation part; validation has about `fraction` of the distinct texts.

    Raises:
        DataError: no text can be held out.
    """
    divided = _held_out_of_sets if dataset.multi_label else _held_out
    held_out = divided(dataset.examples, fraction, random.Random(seed))
    if not held_out:
        texts = len({(example.text, example.text_pair) for example in dataset.examples})
        raise DataError(
            f"none of {texts} different texts can be held out: every label keeps one, and so do "
            "texts with several labels; give --validation or --validation-fraction 0",
            source=dataset.source,
        )
    return divide(dataset, held_out)


def divide(dataset: Dataset, held_out: Collection[Text]) -> tuple[Dataset, Dataset]:
    """The examples whose texts are not held out, and those whose texts are, in their order."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in dataset.examples:
        parts[example.texts in held_out].append(example)
    kept, rest = (replace(dataset, examples=tuple(part)) for part in parts)
    return kept, rest


def _label_of_texts(examples: Sequence[Example]) -> dict[Text, Label | None]:
    """Each text's label or set of labels; None if its rows disagree."""
    label_of: dict[Text, Label | None] = {}
    for example in examples:
        texts, label = example.texts, example.label
        label_of[texts] = label if label_of.get(texts, label) == label else None
    return label_of


def _held_out_of_sets(
    examples: Sequence[Example], fraction: float, generator: random.Random
) -> set[Text]:
    """Texts for validation, where an example has a set of labels."""
    agreed = {
        texts: label for texts, label in _label_of_texts(examples).items() if label is not None
    }
    return hold_out_texts(agreed, fraction, generator)


def _held_out(examples: Sequence[Example], fraction: float, generator: random.Random) -> set[Text]:
    """Texts for validation: `fraction` of each label's; the largest remainders are rounded up."""
    label_of = _label_of_texts(examples)
    texts_of: defaultdict[Label, list[Text]] = defaultdict(list)
    for texts, only_label in label_of.items():
        if only_label is not None:
            texts_of[only_label].append(texts)
    shares = {label: fraction * len(texts) for label, texts in texts_of.items()}
    counts = {
        label: min(math.floor(share), len(texts_of[label]) - 1) for label, share in shares.items()
    }
    total = max(1, round(fraction * len(label_of)))
    order = list(shares)
    generator.shuffle(order)
    order.sort(key=lambda label: shares[label] - counts[label], reverse=True)
    for label in order:
        if sum(counts.values()) >= total:
            break
        if counts[label] < len(texts_of[label]) - 1:
            counts[label] += 1
    return {
        text
        for label, candidates in texts_of.items()
        for text in generator.sample(candidates, counts[label])
    }
