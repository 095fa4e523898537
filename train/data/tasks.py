"""The tasks known by name: where their data is on the hub, their labels and their metric.

`SHARED_LABELS` says which of them have labels of the same meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from string import Formatter

from train.data.dataset import Dataset, Example, check_labels
from train.errors import DataError
from train.metrics import Metric


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task. Its local files have the columns `text`, `text_pair` and `label`.

    text, text_pair: `str.format` templates over the columns of a row on the hub; without
        `text_pair`, the task has single texts.
    label: the column of the label on the hub.
    labels: their names, in the hub's order; empty where they are too many to list: the training
        rows have them.
    words: by column, our names for the hub's values; other values are refused.
    hub: `name[:config]`; None: not on the hub.
    splits: those of train, validation and test that have labels on the hub: their names there.
    rows: numbers of rows in the official splits.
    """

    name: str
    metric: Metric = Metric.ACCURACY
    text: str = "{text}"
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] = ()
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    hub: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are needed of a row on the hub."""
        pieces = Formatter().parse(self.text + (self.text_pair or ""))
        return (*dict.fromkeys(name for _, name, _, _ in pieces if name), self.label)


# The test splits of GLUE and SuperGLUE have no labels there.
_DEVELOPED = {"train": "train", "validation": "validation"}
_TESTED = {"train": "train", "test": "test"}

_ENTAILMENT = ("entailment", "not_entailment")
_SENTIMENT = ("negative", "positive")
_TRUTH = ("false", "true")
_TRUTH_WORDS = {"label": {"False": "false", "True": "true"}}

# The metric is accuracy, except where GLUE (CoLA), SuperGLUE (CB) or the ID-SPAM paper (MRPC, QQP)
# use another. MultiRC is judged by the accuracy of single answers: SuperGLUE's F1 of true answers
# is no macro-F1, and its exact match needs all answers to a question together.
_ALL = (
    Task(
        "mnli",
        text="{premise}",
        text_pair="{hypothesis}",
        labels=("entailment", "neutral", "contradiction"),
        hub="nyu-mll/glue:mnli",
        splits={"train": "train", "validation": "validation_matched"},
        rows={"train": 392_702, "validation": 9_815},
    ),
    Task(
        "qnli",
        text="{question}",
        text_pair="{sentence}",
        labels=_ENTAILMENT,
        hub="nyu-mll/glue:qnli",
        splits=_DEVELOPED,
        rows={"train": 104_743, "validation": 5_463},
    ),
    Task(
        "sst2",
        text="{sentence}",
        labels=_SENTIMENT,
        hub="nyu-mll/glue:sst2",
        splits=_DEVELOPED,
        rows={"train": 67_349, "validation": 872},
    ),
    Task(
        "mrpc",
        metric=Metric.ACCURACY_F1,
        text="{sentence1}",
        text_pair="{sentence2}",
        labels=("not_equivalent", "equivalent"),
        hub="nyu-mll/glue:mrpc",
        splits=_DEVELOPED,
        rows={"train": 3_668, "validation": 408, "test": 1_725},
    ),
    Task(
        "rte",
        text="{sentence1}",
        text_pair="{sentence2}",
        labels=_ENTAILMENT,
        hub="nyu-mll/glue:rte",
        splits=_DEVELOPED,
        rows={"train": 2_490, "validation": 277},
    ),
    Task(
        "qqp",
        metric=Metric.ACCURACY_F1,
        text="{question1}",
        text_pair="{question2}",
        labels=("not_duplicate", "duplicate"),
        hub="nyu-mll/glue:qqp",
        splits=_DEVELOPED,
        rows={"train": 363_846, "validation": 40_430},
    ),
    Task(
        "cola",
        metric=Metric.MATTHEWS,
        text="{sentence}",
        labels=("unacceptable", "acceptable"),
        hub="nyu-mll/glue:cola",
        splits=_DEVELOPED,
        rows={"train": 8_551, "validation": 1_043},
    ),
    Task(
        "cb",
        metric=Metric.ACCURACY_F1,
        text="{premise}",
        text_pair="{hypothesis}",
        labels=("entailment", "contradiction", "neutral"),
        hub="aps/super_glue:cb",
        splits=_DEVELOPED,
        rows={"train": 250, "validation": 56},
    ),
    Task(
        "copa",
        text="{premise} {question}",
        text_pair="(1) {choice1} (2) {choice2}",
        labels=("choice1", "choice2"),
        words={
            "question": {
                "cause": "What was the cause of this?",
                "effect": "What happened as a result?",
            }
        },
        hub="aps/super_glue:copa",
        splits=_DEVELOPED,
        rows={"train": 400, "validation": 100, "test": 500},
    ),
    Task(
        "multirc",
        text="{paragraph}",
        text_pair="{question} {answer}",
        labels=_TRUTH,
        words=_TRUTH_WORDS,
        hub="aps/super_glue:multirc",
        splits=_DEVELOPED,
        rows={"train": 27_243, "validation": 4_848},
    ),
    Task(
        "boolq",
        text="{question}",
        text_pair="{passage}",
        labels=_TRUTH,
        words=_TRUTH_WORDS,
        hub="aps/super_glue:boolq",
        splits=_DEVELOPED,
        rows={"train": 9_427, "validation": 3_270},
    ),
    Task(
        "wic",
        text="{word}: {sentence1}",
        text_pair="{sentence2}",
        labels=_TRUTH,
        words=_TRUTH_WORDS,
        hub="aps/super_glue:wic",
        splits=_DEVELOPED,
        rows={"train": 5_428, "validation": 638},
    ),
    Task(
        "imdb",
        labels=_SENTIMENT,
        words={"label": {"neg": "negative", "pos": "positive"}},
        hub="stanfordnlp/imdb",
        splits=_TESTED,
        rows={"train": 25_000, "test": 25_000},
    ),
    Task(
        "sms_spam",
        text="{sms}",
        labels=("ham", "spam"),
        hub="ucirvine/sms_spam",
        splits={"train": "train"},
        rows={"train": 5_574},
    ),
    Task(
        "banking77",
        hub="legacy-datasets/banking77",
        splits=_TESTED,
        rows={"train": 10_003, "test": 3_080},
    ),
    # The "full" version with out-of-scope rows. The hub has another, with 150 more of these.
    Task(
        "clinc150",
        label="intent",
        hub="clinc/clinc_oos:plus",
        splits=_DEVELOPED | {"test": "test"},
        rows={"train": 15_100, "validation": 3_100, "test": 5_500},
    ),
    Task(
        "ag_news",
        labels=("World", "Sports", "Business", "Sci/Tech"),
        hub="fancyzhx/ag_news",
        splits=_TESTED,
        rows={"train": 120_000, "test": 7_600},
    ),
    # Blitzer's four domains (2007), 2,000 reviews each, without official splits.
    Task("amazon_reviews", labels=_SENTIMENT, rows={"train": 8_000}),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}

# In each group, labels with the same position mean the same.
SHARED_LABELS: tuple[frozenset[str], ...] = (
    frozenset({"sst2", "imdb", "amazon_reviews"}),
    frozenset({"mrpc", "qqp"}),
    frozenset({"rte", "qnli"}),
)


def as_labels_of(dataset: Dataset, *, source: Task, target: Task) -> Dataset:
    """The rows of one task with the label names of another, so that a model trained on `target` can
    be measured on them.

    Args:
        dataset: rows of `source`.

    Raises:
        DataError: the labels of the two tasks differ in meaning, or a row is not of `source`.
    """
    if source.name == target.name:
        return dataset
    if not any({source.name, target.name} <= names for names in SHARED_LABELS):
        raise DataError(
            f"the labels of {source.name} do not mean what those of {target.name} mean",
            source=dataset.source,
        )
    check_labels(dataset, source.labels, known_to=source.name)
    names = dict(zip(source.labels, target.labels, strict=True))
    renamed = (Example(row.text, row.text_pair, names[row.label]) for row in dataset.examples)
    return replace(dataset, examples=tuple(renamed))
