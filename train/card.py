"""The model card beside an adapter: Markdown under YAML front matter, as on the Hugging Face hub.

Reads no file and measures nothing. Names, paths and labels go through `train.markdown.literal`,
commands into fences: whatever they hold stays text.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.loading import DEFAULT_BACKBONE
from adapters.spec import AdapterSpec
from train.assessment import RESAMPLES, Assessment, Estimate
from train.card_details import details
from train.card_origin import data_section, file_section, training_section
from train.markdown import fenced, literal, number, table
from train.report import Baseline, FitReport, Metrics, serving_name

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
