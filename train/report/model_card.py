"""The model card beside an adapter: Markdown with YAML front matter, as on the Hugging Face hub.

`model_card.md.jinja` is the card; this file computes its variables and writes the result.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adapters.backbone.loading import DEFAULT_BACKBONE
from adapters.format.durable import write_atomically
from adapters.format.spec import AdapterSpec, Prompt, StaticPrompt
from train.abstaining import CONFIDENCE
from train.calibration import Calibrated
from train.errors import OutputError
from train.loop.progress import EpochReport
from train.metrics import RESAMPLES, Assessment, Bin, Estimate, LabelFigures
from train.report.card_file import card_path, is_card
from train.report.markdown import Markdown, alignment, fenced, literal, number
from train.report.report import (
    Baseline,
    DataReport,
    FitReport,
    TrialReport,
    machine,
    serving_name,
    versions,
)
from train.set_metrics import MultiLabelAssessment

MOST_LABELS = 40
WEAKEST_LABELS = 20
MOST_EPOCHS = 40
MOST_TRIALS = 40
CHART_WIDTH = 40
# With fewer rows, the figures of a label are hardly more than guesses.
FEW_ROWS = 20

_TEMPLATE = "model_card.md.jinja"
_URL = "http://127.0.0.1:8000"
_DEFAULT_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# The hub's licence identifiers that data sets use; any other licence is `other`, with a name.
_HUB_LICENCE = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause)?|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0|odc-by|odbl|pddl"
    r"|[al]?gpl-3\.0|gpl-2\.0|unlicense"
)
# Fields of the spec that the card shows elsewhere.
_SHOWN_ELSEWHERE = {
    "backbone",
    "labels",
    "thresholds",
    "calibration",
    "decision",
    "provenance",
    "tokenizer_sha256",
}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """The content of a card.

    assessments: by split, of the stored weights. file_name: without its folder. file_size: bytes.
    revision: sha256 of the file. machine: its description. versions: by package. paired: whether an
    input is two texts.
    """

    report: FitReport
    spec: AdapterSpec
    assessments: Mapping[str, Assessment | MultiLabelAssessment]
    file_name: str
    file_size: int
    revision: str
    machine: str
    versions: Mapping[str, str]
    paired: bool

    @property
    def name(self) -> str:
        """A name that a service accepts for the adapter."""
        return serving_name(self.file_name)

    @property
    def detailed_split(self) -> str | None:
        """The split that the card shows in detail: test if there is one."""
        order = ("test", "validation", *self.assessments)
        return next((split for split in order if split in self.assessments), None)

    @property
    def judge(self) -> str | None:
        """The split that chose the best epoch and the temperature."""
        order = ("selection", "validation")
        return next((split for split in order if split in self.report.data), None)


def check_card(output: Path) -> None:
    """
    Raises:
        OutputError: the card would replace something that is not a card.
    """
    path = card_path(output)
    if path.is_dir():
        raise OutputError(
            f"{path} is a folder, but the model card of {output} would be written there"
        )
    if path.exists() and not is_card(path):
        raise OutputError(
            f"{path} is not a model card and would be replaced by that of {output}: "
            "rename one of the two"
        )


def write_card(
    output: Path,
    report: FitReport,
    spec: AdapterSpec,
    *,
    device: torch.device,
    processes: int,
    paired: bool,
) -> None:
    """Write the card of the adapter file `output`.

    Args:
        device: of this process. processes: that trained it, each on a GPU of its own if on any.
    """
    content = output.read_bytes()
    facts = CardFacts(
        report=report,
        spec=spec,
        assessments=report.assessments,
        file_name=output.name,
        file_size=len(content),
        revision=hashlib.sha256(content).hexdigest(),
        machine=_machine(device, processes),
        versions=versions(),
        paired=paired,
    )
    write_atomically(card_path(output), model_card(facts).encode())


def _machine(device: torch.device, processes: int) -> str:
    if device.type != "cuda":
        return machine()
    number = "one" if processes == 1 else str(processes)
    return f"{number} {torch.cuda.get_device_name(device)}"


def model_card(facts: CardFacts) -> str:
    """The whole card; ends with a line end, and encodes as UTF-8 whatever the facts hold."""
    report, spec, split = facts.report, facts.spec, facts.detailed_split
    trials = _best_trials(report.trials)
    return (
        environment()
        .get_template(_TEMPLATE)
        .render(
            facts=facts,
            report=report,
            spec=spec,
            split=split,
            judge=facts.judge,
            several=spec.multi_label,
            made_with=_made_with(spec),
            trained_parts=_trained_parts(spec),
            **_figures(spec),
            front_matter=_front_matter(spec),
            confidence=CONFIDENCE,
            fitted=report.calibration is not None and report.calibration.fitted is not None,
            calibration_note=_calibration_note(report.calibration, facts.judge),
            serve_command=_serve_command(spec),
            ask_commands=_ask_commands(facts),
            label_spreads=_label_spreads(report.data, spec.labels),
            epochs=_thinned(report.epochs, report.best_epoch),
            settings=_settings(report, spec),
            trials=trials,
            trial_marks=[
                alignment([_short(trial.settings[name]) for trial in trials])
                for name in (trials[0].settings if trials else ())
            ],
            file_fields=_file_fields(facts),
            **({} if split is None else _measured(facts, split)),
        )
    )


@cache
def environment() -> Environment:
    """Jinja for Markdown: nothing is escaped automatically; unescaped text is refused."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_checked,
    )
    environment.filters |= {
        "literal": literal,
        "fenced": fenced,
        "number": number,
        "count": lambda value: Markdown(f"{value:,}"),
        "fixed": lambda value, digits: Markdown(f"{value:,.{digits}f}"),
        "interval": _interval,
        "control": _control,
        "value": _value,
        "short": _short,
    }
    return environment


def _checked(value: object) -> object:
    """Everything that the template prints passes through here."""
    if isinstance(value, str) and not isinstance(value, Markdown):
        raise TypeError(f"the template prints {value!r} without an escaping filter")
    return value


def _interval(estimate: Estimate) -> Markdown:
    return Markdown(f"{number(estimate.low)} to {number(estimate.high)}")


def _control(baseline: Baseline, split: str, figure: str) -> Markdown:
    """A figure of a baseline, which has none for splits other than validation and test."""
    return number(getattr(getattr(baseline, split, None), figure, None))


def _value(value: object) -> Markdown:
    match value:
        case None:
            return Markdown("-")
        case bool():
            return Markdown("yes" if value else "no")
        case int() | float():
            return Markdown(value)
        case _:
            return literal(str(value))


def _short(value: object) -> Markdown:
    return Markdown(f"{value:.4g}") if isinstance(value, float) else _value(value)


def _front_matter(spec: AdapterSpec) -> Markdown:
    """Every value is JSON: valid YAML that needs no rules about quotes."""
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
        "tags": ["id-spam", *_tags(spec), "text-classification"],
        "metrics": ["f1", "accuracy"]
        if spec.multi_label
        else ["accuracy", "f1", "matthews_correlation"],
    }
    return Markdown("\n".join(f"{key}: {json.dumps(fields[key])}" for key in fields))


_PROMPTS = {
    "attention": (
        "[ID-SPAM](https://arxiv.org/abs/2506.05629)",
        "a small generator computes a soft prompt from each text",
    ),
    "first-token": ("LPT", "a small network makes a soft prompt from each text's first token"),
    "routed": ("SMoP", "a router chooses one of several soft prompts for each text"),
    "static": ("prompt tuning", "a soft prompt is the same for every text"),
}
_TUNINGS = {
    "vectors": ("vectors", "vectors scale and shift what the layers compute"),
    "lora": ("LoRA", "narrow matrices change what the layers compute"),
}


def _prompt_of(prompt: Prompt) -> tuple[str, str]:
    if isinstance(prompt, StaticPrompt) and prompt.table is not None:
        return "DePT", "a soft prompt and a table of the positions are the same for every text"
    return _PROMPTS[prompt.kind]


def _made_with(spec: AdapterSpec) -> Markdown:
    """`ID-SPAM and vectors: ..., and a class head predicts the label`."""
    parts = [_prompt_of(spec.prompt)] if spec.prompt is not None else []
    parts += [_TUNINGS[spec.tuning.kind]] if spec.tuning is not None else []
    if not parts:
        return Markdown("a class head alone, which predicts the label")
    names = " and ".join(name for name, _ in parts)
    steps = [step for _, step in parts] + ["a class head predicts the label"]
    return Markdown(f"{names}: {', '.join(steps[:-1])}, and {steps[-1]}")


def _tags(spec: AdapterSpec) -> list[str]:
    tags = ["soft-prompt", "prompt-tuning"] if spec.prompt is not None else []
    return tags + ([spec.tuning.kind] if spec.tuning is not None else [])


def _trained_parts(spec: AdapterSpec) -> Markdown:
    """The subject of `... worth training`."""
    prompt, tuning = spec.prompt, spec.tuning
    if prompt is None:
        return Markdown("changes inside the layers were")
    return Markdown("the prompt was" if tuning is None else "the prompt and the vectors were")


def _serve_command(spec: AdapterSpec) -> str:
    return f"IDSPAM_BACKBONE={shlex.quote(spec.backbone.name)} .venv/bin/python -m service serve"


def _ask_commands(facts: CardFacts) -> str:
    inputs: object = "a text to classify"
    if facts.paired:
        inputs = {"text": "the first text", "text_pair": "the second text"}
    body = json.dumps({"adapter": facts.name, "inputs": inputs})
    push = ["--adapter", facts.file_name, "--name", facts.name, "--url", _URL]
    return (
        f".venv/bin/python -m train push {shlex.join(push)}\n"
        f"curl -s {_URL}/v1/predict -H 'Content-Type: application/json' \\\n  -d '{body}'"
    )


def _label_spreads(data: Mapping[str, DataReport], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Above `MOST_LABELS` labels: the rarest and the most frequent one of every split."""
    if len(labels) <= MOST_LABELS:
        return []
    spreads = []
    for split, rows in data.items():
        counts = {label: rows.labels.get(label, 0) for label in labels}
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        spreads.append(
            {
                "split": split,
                "least": counts[least],
                "least_label": least,
                "median": Markdown(f"{median(counts.values()):,g}"),
                "most": counts[most],
                "most_label": most,
            }
        )
    return spreads


def _figures(spec: AdapterSpec) -> dict[str, Any]:
    """The figures of the card: their fields and titles, and which of them judges the adapter."""
    figures = {"accuracy": "accuracy", "macro_f1": "macro-F1", "matthews": "Matthews"}
    if spec.multi_label:
        figures = {"micro_f1": "micro-F1", "macro_f1": "macro-F1", "exact_match": "exact match"}
    judged = next(iter(figures))
    return {
        "shown_figures": {field: Markdown(title) for field, title in figures.items()},
        "judged": judged,
        "judged_title": Markdown(figures[judged]),
        "thresholds": dict(zip(spec.labels, spec.label_thresholds, strict=True)),
    }


def _measured(facts: CardFacts, split: str) -> dict[str, Any]:
    """The variables that only a card with measured rows has."""
    measured, report = facts.assessments[split], facts.report
    controls = [getattr(baseline, split, None) for baseline in (report.head_only, report.majority)]
    judged = _figures(facts.spec)["judged"]
    scores = [getattr(control, judged) for control in controls if control is not None]
    reliabilities = [measured.unscaled]
    if measured.scaled.temperature != measured.unscaled.temperature:
        reliabilities.append(measured.scaled)
    return {
        "measured": measured,
        "head_only": controls[0],
        "majority": controls[1],
        "best_control": max(scores, default=-1.0),
        "weakest_labels": _weakest(measured.labels),
        "reliabilities": reliabilities,
        "reliability_chart": _chart(measured.scaled.bins),
        "resamples": RESAMPLES,
        "few_rows": FEW_ROWS,
        "labels_of_few_rows": sum(label.support < FEW_ROWS for label in measured.labels),
    }


def _calibration_note(chosen: Calibrated | None, judge: str | None) -> Markdown | None:
    """How the temperature was chosen."""
    if chosen is None or judge is None:
        return None
    rows = f"the {chosen.rows:,} rows of {literal(judge)}"
    if chosen.fitted is None or chosen.cross_fitted is None:
        return Markdown(f"The temperature is 1: {rows} are too few to fit another.")
    return Markdown(
        f"A temperature is fitted on {rows}. It is kept only if it lowers their expected "
        "calibration error, cross-fitted: each row is scored with the temperature that other rows "
        f"choose. Fitted: {_short(chosen.fitted)}. Error at temperature 1: "
        f"{number(chosen.before)}, cross-fitted: {number(chosen.cross_fitted)}. "
        f"{'Kept' if chosen.kept else 'Not kept'}."
    )


def _weakest(labels: Sequence[LabelFigures]) -> list[LabelFigures]:
    """Above `MOST_LABELS` labels: those of lowest F1."""
    if len(labels) <= MOST_LABELS:
        return []
    occurring = [label for label in labels if label.f1 is not None]
    return sorted(occurring, key=lambda label: label.f1 or 0.0)[:WEAKEST_LABELS]


def _chart(bins: Sequence[Bin]) -> str:
    """A reliability diagram in characters."""
    lines = [
        "█ accuracy, │ mean score: where a bar ends before the line, scores promise too much",
        "",
    ]
    for part in bins:
        if part.accuracy is None or part.score is None:
            continue
        filled = round(part.accuracy * CHART_WIDTH)
        bar = "█" * filled + "·" * (CHART_WIDTH - filled)
        mean = round(part.score * CHART_WIDTH)
        lines.append(
            f"{part.low:.2f} to {part.high:.2f} {bar[:mean]}│{bar[mean:]} "
            f"{part.accuracy:.2f} of {part.rows:,}"
        )
    return "\n".join(lines)


def _thinned(epochs: Sequence[EpochReport], best: int) -> Iterator[EpochReport]:
    """About `MOST_EPOCHS` at most: evenly spaced ones, the best and the last."""
    step = math.ceil(len(epochs) / MOST_EPOCHS)
    for index, epoch in enumerate(epochs):
        if index % step == 0 or epoch.epoch == best or index == len(epochs) - 1:
            yield epoch


def _settings(report: FitReport, spec: AdapterSpec) -> dict[str, Any]:
    elsewhere = spec.model_dump().keys() | {"command"}
    return {name: value for name, value in report.settings.items() if name not in elsewhere}


def _best_trials(trials: Sequence[TrialReport]) -> list[TrialReport]:
    """At most `MOST_TRIALS`, the chosen one among them, in the order in which they ran."""
    ranked = sorted(trials, key=lambda trial: (not trial.chosen, -(trial.accuracy or 0.0)))
    return sorted(ranked[:MOST_TRIALS], key=lambda trial: trial.number)


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of parts as `prompt.length`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def _file_fields(facts: CardFacts) -> dict[Markdown, Any]:
    """What the file is, and the design that its spec declares."""
    spec = facts.spec
    fields = {
        "file": facts.file_name,
        "revision (sha256 of the file)": facts.revision,
        "bytes": facts.file_size,
        "type of the tensors": facts.report.settings.get("storage_dtype"),
        "backbone": spec.backbone.name,
        "backbone's fingerprint": spec.backbone.fingerprint,
        "tokenizer's sha256": spec.tokenizer_sha256,
        "temperature": spec.calibration.temperature,
        "made by version": spec.provenance.code_version,
        "made at": spec.provenance.created,
        **_flat(spec.model_dump(mode="json", exclude=_SHOWN_ELSEWHERE, exclude_none=True)),
    }
    return {Markdown(field): value for field, value in fields.items()}
