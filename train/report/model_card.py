"""The model card beside an adapter: Markdown under YAML front matter, as on the Hugging Face hub.

Reads no file and measures nothing. Names, paths and labels go through `train.report.model_card.literal`,
commands into fences: whatever they hold stays text.
"""

import hashlib
import json
import math
import os
import platform
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adapters.backbone.loading import DEFAULT_BACKBONE
from adapters.format.durable import write_atomically
from adapters.format.spec import AdapterSpec
from train.errors import OutputError
from train.report.metrics import (
    RESAMPLES,
    Assessment,
    Bin,
    Estimate,
    LabelFigures,
    Metrics,
    Reliability,
)
from train.report.report import (
    Baseline,
    DataReport,
    EpochReport,
    FitReport,
    TrialReport,
    serving_name,
    versions,
)

# --- merged from train.markdown

# Joiners: invisible, but letters of some languages and parts of emoji.
_JOINERS = "\u200c\u200d"
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


def visible(text: str) -> str:
    r"""One line without what cannot be seen or encoded: line ends, controls, lone surrogates.

    They become what Python writes for them: `\n`, `\x1b`, `\ud800`.
    """
    return "".join(
        item if item.isprintable() or item in _JOINERS else ascii(item).strip("'") for item in text
    )


def literal(text: str) -> str:
    """Foreign text as inline Markdown: a code span, or with every punctuation mark as an entity.

    A code span is what people read best. Of what cannot stand in one, in a table, without a rule
    that renderers differ in, no character is left that any of them could read as markup.
    """
    shown = visible(text)
    if shown and not set(shown) & set("`|\\<>&"):
        return f"`{shown}`"
    return _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", shown)


def fenced(text: str, language: str = "") -> str:
    """Lines for copying, between fences longer than any within them; the rest as `visible`."""
    text = "\n".join(visible(line) for line in text.split("\n"))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; columns of figures are set to the right."""
    body = [tuple(row) for row in rows]
    assert all(len(row) == len(head) for row in body)
    marks = [
        "---:" if body and all(re.match(r"-?\d|-$", row[column]) for row in body) else "---"
        for column in range(len(head))
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *body))


def number(value: float | None) -> str:
    """Four decimals; `-` where there is no figure or none that is finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


# --- merged from train.card_details

MOST_LABELS = 40
WEAKEST_LABELS = 20
CHART_WIDTH = 40

_LEGEND = "█ accuracy, │ mean score: where a bar ends before the line, scores promise too much\n"


def details(split: str, found: Assessment) -> Iterator[str]:
    """Markdown blocks; all labels up to `MOST_LABELS`, above that those of lowest F1."""
    yield from _labels(split, found)
    yield from _confusion(split, found)
    yield from _calibration(split, found)
    yield from _coverage(split, found)


def _labels(split: str, found: Assessment) -> Iterator[str]:
    occurring = [label for label in found.labels if label.f1 is not None]
    if len(found.labels) <= MOST_LABELS:
        yield f"### Labels, on {literal(split)}"
        shown = list(found.labels)
    else:
        shown = sorted(occurring, key=_f1)[:WEAKEST_LABELS]
        yield f"### The {len(shown)} labels of lowest F1, on {literal(split)}"
    yield table(
        ("label", "rows", "answers", "precision", "recall", "F1"),
        [
            (
                literal(label.label),
                f"{label.support:,}",
                f"{label.predicted:,}",
                number(label.precision),
                number(label.recall),
                number(label.f1),
            )
            for label in shown
        ],
    )


def _f1(label: LabelFigures) -> float:
    return 0.0 if label.f1 is None else label.f1


def _confusion(split: str, found: Assessment) -> Iterator[str]:
    yield f"### Confusion, on {literal(split)}"
    if found.matrix is not None:
        names = [literal(label.label) for label in found.labels]
        yield "A row is a true label, a column an answer."
        yield table(
            ("", *names),
            [
                (name, *(f"{count:,}" for count in counts))
                for name, counts in zip(names, found.matrix, strict=True)
            ],
        )
    elif found.confusions:
        yield "The most frequent mistakes:"
        yield table(
            ("true label", "answer", "rows"),
            [
                (literal(item.true), literal(item.predicted), f"{item.count:,}")
                for item in found.confusions
            ],
        )
    else:
        yield "There was no mistake."


def _calibration(split: str, found: Assessment) -> Iterator[str]:
    yield f"### Calibration, on {literal(split)}"
    yield (
        "Whether what scores .9 is right nine times of ten. The expected calibration error is the "
        "mean distance between score and accuracy in the table below; lower is better for all "
        "three. Likelihood in nats."
    )
    measured = [found.unscaled]
    if found.scaled.temperature != found.unscaled.temperature:
        measured.append(found.scaled)
    yield table(
        (
            "scores",
            "expected calibration error",
            "Brier score (0 to 2)",
            "negative log-likelihood",
        ),
        [(_temperature(item), *_errors(item)) for item in measured],
    )
    filled = [item for item in found.scaled.bins if item.rows]
    yield f"The top score, {_temperature(found.scaled)}, against how often it is right:"
    yield table(
        ("top score", "rows", "mean score", "accuracy"),
        [
            (_range(item), f"{item.rows:,}", number(item.score), number(item.accuracy))
            for item in filled
        ],
    )
    yield fenced("\n".join([_LEGEND, *map(_bar, filled)]))


def _temperature(found: Reliability) -> str:
    return f"at temperature {found.temperature:.4g}"


def _errors(found: Reliability) -> tuple[str, ...]:
    return (
        number(found.expected_calibration_error),
        number(found.brier),
        number(found.negative_log_likelihood),
    )


def _range(item: Bin) -> str:
    return f"{item.low:.2f} to {item.high:.2f}"


def _bar(item: Bin) -> str:
    assert item.accuracy is not None
    assert item.score is not None
    right = round(item.accuracy * CHART_WIDTH)
    cells = list("█" * right + "·" * (CHART_WIDTH - right))
    # Between the cells up to the score and those above it.
    cells.insert(round(item.score * CHART_WIDTH), "│")
    return f"{_range(item)} {''.join(cells)} {item.accuracy:.2f} of {item.rows:,}"


def _coverage(split: str, found: Assessment) -> Iterator[str]:
    yield f"### Answering only what it is sure of, on {literal(split)}"
    yield (
        "Answer texts whose top score is at least the threshold, give the others to people: how "
        "many are answered, and how many of these correctly."
    )
    yield table(
        ("most confident", "threshold", "rows answered", "accuracy"),
        [
            (
                f"{item.coverage * 100:.0f} %",
                # Rounded down: rounded up it would shut out rows that are counted here.
                f"{math.floor(item.threshold * 1e6) / 1e6:.6f}",
                f"{item.rows:,}",
                number(item.accuracy),
            )
            for item in found.coverage
        ],
    )


# --- merged from train.card_origin

MOST_EPOCHS = 40
MOST_TRIALS = 40

# Of the spec: what has a row or a place of its own.
_ELSEWHERE = {"backbone", "labels", "calibration", "provenance", "tokenizer_sha256"}


def data_section(data: Mapping[str, DataReport], spec: AdapterSpec) -> Iterator[str]:
    """Which rows were used, by split, and how the labels are spread."""
    labels, past = spec.labels, spec.provenance
    yield "## Data"
    licence = literal(past.data_licence) if past.data_licence else "not stated"
    yield f"{literal(past.data or 'Unnamed')}. Licence of the data: {licence}."
    yield table(
        ("split", "rows", "source", "sha256 of the source"),
        [
            (literal(split), f"{found.rows:,}", literal(found.path), literal(found.sha256))
            for split, found in data.items()
        ],
    )
    counts = {
        split: {label: found.labels.get(label, 0) for label in labels}
        for split, found in data.items()
    }
    if len(labels) <= MOST_LABELS:
        rows = [
            (literal(label), *(f"{found[label]:,}" for found in counts.values()))
            for label in labels
        ]
        yield table(("rows of", *map(literal, data)), rows)
        return
    yield f"Rows of a label, of {len(labels):,} labels:"
    yield table(
        ("split", "least", "of", "median", "most", "of"),
        [(literal(split), *_spread(found)) for split, found in counts.items()],
    )


def _spread(counts: Mapping[str, int]) -> Iterator[str]:
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    yield from (f"{counts[least]:,}", literal(least))
    yield f"{median(counts.values()):,g}"
    yield from (f"{counts[most]:,}", literal(most))


def training_section(
    report: FitReport, spec: AdapterSpec, *, judge: str | None, place: str
) -> Iterator[str]:
    """How it was trained.

    judge: the split that chose the best epoch. place: machine and versions, Markdown.
    """
    yield "## Training"
    judged = f"judged on {literal(judge)}, as the epochs below" if judge else "judged on no rows"
    yield (
        f"{report.trainable_parameters:,} trained parameters, the backbone's are frozen. Best of "
        f"{len(report.epochs)} epochs: {report.best_epoch}, {judged}. {report.seconds:,.1f} s in "
        f"all, {report.seconds_per_epoch:,.2f} s an epoch, on {place}."
    )
    if report.command is not None:
        yield fenced(report.command, "sh")
    yield table(
        ("epoch", "training loss", "accuracy", "macro-F1", "seconds", ""),
        [
            (
                str(epoch.epoch),
                number(epoch.loss),
                number(epoch.accuracy),
                number(epoch.macro_f1),
                f"{epoch.seconds:,.1f}",
                "kept" if epoch.epoch == report.best_epoch else "",
            )
            for epoch in _thinned(report.epochs, report.best_epoch)
        ],
    )
    elsewhere = spec.model_dump().keys() | {"command"}
    settings = {key: item for key, item in report.settings.items() if key not in elsewhere}
    yield table(("setting", "value"), [(literal(key), _value(settings[key])) for key in settings])
    if report.trials:
        yield from _search(report.trials, judge=judge or "no rows")


def _search(trials: Sequence[TrialReport], *, judge: str) -> Iterator[str]:
    """What else was tried. Rows that chose flatter what they chose."""
    yield "### The search that chose these settings"
    yield (
        f"{len(trials):,} trials, compared by their accuracy on {literal(judge)}; the first one "
        "had the settings of a run without a search. That the best one was taken makes its figures "
        f"on {literal(judge)} better than on other rows."
    )
    ranked = sorted(trials, key=lambda trial: (not trial.chosen, -(trial.accuracy or 0.0)))
    shown = sorted(ranked[:MOST_TRIALS], key=lambda trial: trial.number)
    if len(shown) < len(trials):
        yield f"The best {len(shown)}:"
    names = list(trials[0].settings)
    yield table(
        ("trial", *map(literal, names), "accuracy", "epochs", ""),
        [
            (
                str(trial.number),
                *(_short(trial.settings[name]) for name in names),
                number(trial.accuracy),
                str(trial.epochs),
                "kept" if trial.chosen else literal(trial.outcome),
            )
            for trial in shown
        ],
    )


def file_section(spec: AdapterSpec, file: Mapping[str, Any]) -> Iterator[str]:
    """What the file is, and the switches of the method that its spec declares."""
    rows = {
        **file,
        "backbone": spec.backbone.name,
        "backbone's fingerprint": spec.backbone.fingerprint,
        "tokenizer's sha256": spec.tokenizer_sha256,
        "temperature": spec.calibration.temperature,
        "made by version": spec.provenance.code_version,
        "made at": spec.provenance.created,
        **spec.model_dump(mode="json", exclude=_ELSEWHERE),
    }
    yield "## The file"
    yield table(("field", "value"), [(key, _value(rows[key])) for key in rows])


def _thinned(epochs: Sequence[EpochReport], best: int) -> Iterator[EpochReport]:
    """At most about `MOST_EPOCHS`: every so many, and the best and the last."""
    step = math.ceil(len(epochs) / MOST_EPOCHS)
    for index, epoch in enumerate(epochs):
        if index % step == 0 or epoch.epoch == best or index == len(epochs) - 1:
            yield epoch


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _value(value)


def _value(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return str(value)
        case _:
            return literal(str(value))


# --- merged from train.card

# Of a label; with fewer its own figures are hardly more than guesses.
FEW_ROWS = 20

_URL = "http://127.0.0.1:8000"
_DEFAULT_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Those of the hub's identifiers that data sets have; any other is `other` with a name.
_HUB_LICENCE = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause)?|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0|odc-by|odbl|pddl"
    r"|[al]?gpl-3\.0|gpl-2\.0|unlicense"
)
_FIGURES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "matthews": "Matthews"}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card is made of.

    assessments: by split, of the stored weights. file_name: without its folder. file_size: bytes.
    revision: sha256 of the file. machine: in words. versions: by package. paired: whether an input
    is two texts.
    """

    report: FitReport
    spec: AdapterSpec
    assessments: Mapping[str, Assessment]
    file_name: str
    file_size: int
    revision: str
    machine: str
    versions: Mapping[str, str]
    paired: bool

    @property
    def name(self) -> str:
        """What the adapter may be served under."""
        return serving_name(self.file_name)

    @property
    def shown(self) -> str | None:
        """The split that is shown in detail: test if there is one."""
        order = ("test", "validation", *self.assessments)
        return next((split for split in order if split in self.assessments), None)

    @property
    def chosen_on(self) -> str | None:
        """The split that chose the best epoch and the temperature."""
        order = ("selection", "validation")
        return next((split for split in order if split in self.report.data), None)


def card_path(output: Path) -> Path:
    """Where the card of an adapter file lies: `x.safetensors` has `x.md` beside it."""
    return output.with_suffix(".md")


def model_card(facts: CardFacts) -> str:
    """The whole card; ends with a line end, and encodes as UTF-8 whatever its facts hold."""
    blocks = [
        _front_matter(facts.spec),
        *_summary(facts),
        *_use(facts),
        *data_section(facts.report.data, facts.spec),
    ]
    if facts.shown is not None:
        blocks += [*_results(facts), *details(facts.shown, facts.assessments[facts.shown])]
    blocks += [
        *training_section(facts.report, facts.spec, judge=facts.chosen_on, place=_place(facts)),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(facts)),
        *file_section(facts.spec, _file(facts)),
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(spec: AdapterSpec) -> str:
    """Every value as JSON, which is YAML without anything to guess about quotes."""
    licence = re.sub("[^a-z0-9.]+", "-", (spec.provenance.data_licence or "").lower()).strip("-.")
    backbone = spec.backbone.name.partition("@")[0]
    if backbone == DEFAULT_BACKBONE:
        backbone = _DEFAULT_ON_HUB
    fields: dict[str, Any] = {}
    if _HUB_LICENCE.fullmatch(licence):
        fields |= {"license": licence}
    elif spec.provenance.data_licence:
        fields |= {"license": "other", "license_name": licence or "named-in-the-card"}
    if _HUB_NAME.fullmatch(backbone):
        fields |= {"base_model": backbone, "base_model_relation": "adapter"}
    fields |= {
        "pipeline_tag": "text-classification",
        "library_name": "id-spam",
        "tags": ["id-spam", "soft-prompt", "prompt-tuning", "text-classification"],
        "metrics": ["accuracy", "f1", "matthews_correlation"],
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(fields[key])}" for key in fields), "---"])


def _summary(facts: CardFacts) -> Iterator[str]:
    yield f"# {literal(facts.name)}"
    yield (
        "An adapter by the method [ID-SPAM](https://arxiv.org/abs/2506.05629): a soft prompt "
        "written for every text from the text itself, and a class head, for the frozen backbone "
        f"{literal(facts.spec.backbone.name)}. It gives every "
        f"{'pair of texts' if facts.paired else 'text'} one of {len(facts.spec.labels):,} labels."
    )
    if (split := facts.shown) is None:
        yield "**Nothing was measured**: there were no validation and no test rows."
        return
    found = facts.assessments[split]
    controls = {
        "a class head alone": _of(facts.report.head_only, split),
        "always the most frequent label": _of(facts.report.majority, split),
    }
    measured = {name: control.accuracy for name, control in controls.items() if control}
    beside = "".join(f", {name} {number(value)}" for name, value in measured.items())
    yield (
        f"Share of {found.rows:,} rows of {literal(split)} that are answered correctly: this "
        f"adapter **{number(found.accuracy.value)}** (95 % interval "
        f"{_interval(found.accuracy)}){beside}."
    )
    if max(measured.values(), default=-1.0) >= found.accuracy.low:
        yield (
            "**A control without a prompt lies inside this interval or above it**: these rows "
            "alone do not show that the prompt was worth training."
        )


def _use(facts: CardFacts) -> Iterator[str]:
    inputs: Any = "a text to classify"
    if facts.paired:
        inputs = {"text": "the first text", "text_pair": "the second text"}
    body = json.dumps({"adapter": facts.name, "inputs": inputs})
    push = ["--adapter", facts.file_name, "--name", facts.name, "--url", _URL]
    yield "## Use"
    yield "In the folder of the ID-SPAM service, start it with this adapter's backbone:"
    backbone = shlex.quote(facts.spec.backbone.name)
    yield fenced(f"IDSPAM_BACKBONE={backbone} .venv/bin/python -m service", "sh")
    yield "In another terminal, publish the adapter and ask it:"
    yield fenced(
        f".venv/bin/python -m train push {shlex.join(push)}\n"
        f"curl -s {_URL}/v1/predict -H 'Content-Type: application/json' \\\n  -d '{body}'",
        "sh",
    )


def _results(facts: CardFacts) -> Iterator[str]:
    yield "## Results"
    rows = []
    for split, found in facts.assessments.items():
        for field, title in _FIGURES.items():
            estimate: Estimate = getattr(found, field)
            controls = (
                _control(baseline, split, field)
                for baseline in (facts.report.head_only, facts.report.majority)
            )
            value = number(estimate.value)
            rows.append((literal(split), title, value, _interval(estimate), *controls))
    yield table(
        ("split", "figure", "this adapter", "95 % interval", "head only", "majority class"), rows
    )
    yield (
        f"Intervals are percentile bootstraps of the rows ({RESAMPLES:,} resamples). Head only is "
        "a logistic regression on the frozen backbone's last states, majority class the training "
        "rows' most frequent label. macro-F1 is the plain mean over the labels; Matthews goes from "
        "-1 to 1."
    )


def _limits(facts: CardFacts) -> Iterator[str]:
    yield (
        f"It knows its {len(facts.spec.labels):,} labels and nothing else. A text that belongs to "
        "none of them gets one all the same, at times with a high score: train with a label for "
        "such texts, or give what scores low to people."
    )
    yield (
        "Its language or languages are those of its data and its backbone; neither was identified "
        "here. The figures hold for texts like the measured ones, not for other languages, "
        "sources or times."
    )
    yield (
        f"A text is cut to {facts.spec.max_length:,} tokens, special tokens included, and what "
        'comes later is not read. The service says `truncated`; `"truncate": false` refuses.'
    )
    if (split := facts.shown) is not None:
        found, where = facts.assessments[split], literal(split)
        width = found.accuracy.high - found.accuracy.low
        yield (
            f"The interval of the accuracy on {where} is {width:.4f} wide. It covers the choice of "
            f"{found.rows:,} rows: not another seed (this is one run), mislabelled rows or drift."
        )
        if found.accuracy.value == 1.0:
            yield (
                f"No mistake among {found.rows:,} rows does not mean none: up to "
                f"{min(1.0, 3 / found.rows):.4f} of such texts may be answered wrongly (95 %, the "
                "rule of three)."
            )
        if few := sum(label.support < FEW_ROWS for label in found.labels):
            yield (
                f"Labels with fewer than {FEW_ROWS} rows in {where}: {few:,} of "
                f"{len(found.labels):,}. Their own figures are hardly more than guesses."
            )
    if (judge := facts.chosen_on) is not None and judge in facts.assessments:
        yield (
            f"The epoch and the scores' temperature were chosen on {literal(judge)}: its figures "
            "flatter the adapter a little."
        )


def _place(facts: CardFacts) -> str:
    versions = (literal(f"{name} {found}") for name, found in facts.versions.items())
    return f"{literal(facts.machine)}, with {', '.join(versions)}"


def _file(facts: CardFacts) -> dict[str, Any]:
    return {
        "file": facts.file_name,
        "revision (sha256 of the file)": facts.revision,
        "bytes": facts.file_size,
        "type of the tensors": facts.report.settings.get("storage_dtype"),
    }


def _of(baseline: Baseline, split: str) -> Metrics | None:
    """A control's figures; it has none for splits other than validation and test."""
    found: Metrics | None = getattr(baseline, split, None)
    return found


def _control(baseline: Baseline, split: str, figure: str) -> str:
    found = _of(baseline, split)
    return number(None if found is None else getattr(found, figure))


def _interval(estimate: Estimate) -> str:
    return f"{number(estimate.low)} to {number(estimate.high)}"


# --- merged from train.card_file

# A line of the front matter of every card that was written here.
_MARK = b'library_name: "id-spam"'
_FRONT_MATTER_BYTES = 2**16


def check_card(output: Path) -> None:
    """
    Raises:
        OutputError: the card would take the place of something that is not a card.
    """
    path = card_path(output)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, but the model card of {output} goes there")
    if path.exists() and not _is_card(path):
        raise OutputError(
            f"{path}: is no model card and would be replaced by that of {output}: "
            "rename one of the two"
        )


def write_card(
    output: Path, report: FitReport, spec: AdapterSpec, *, device: torch.device, paired: bool
) -> None:
    """Write the card of the adapter file that lies at `output`."""
    data = output.read_bytes()
    facts = CardFacts(
        report=report,
        spec=spec,
        assessments=report.assessments,
        file_name=output.name,
        file_size=len(data),
        revision=hashlib.sha256(data).hexdigest(),
        machine=_machine(device),
        versions=versions(),
        paired=paired,
    )
    write_atomically(card_path(output), model_card(facts).encode())


def _is_card(path: Path) -> bool:
    with path.open("rb") as file:
        beginning = file.read(_FRONT_MATTER_BYTES)
    front, _, _ = beginning.removeprefix(b"---\n").partition(b"\n---\n")
    return beginning.startswith(b"---\n") and _MARK in front.splitlines()


def _machine(device: torch.device) -> str:
    """In words."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPU cores ({_processor()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
