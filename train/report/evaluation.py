"""`evaluate`: measure an adapter file on labelled texts with the code that serves it."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import PreparedAdapter, classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import load_adapter
from adapters.format.spec import AdapterSpec
from adapters.tokenizer import Encoding
from train.abstaining import Judged
from train.config.defaults import load_backbone_on
from train.config.settings import ComputeType
from train.data.dataset import Dataset, check_label_kind, check_labels
from train.loop.encoded_splits import classes_of, encode
from train.loop.progress import Progress
from train.loop.trunk_cache import TrunkCache
from train.metrics import Assessment, assess
from train.objective import OBJECTIVES
from train.report.baselines import majority
from train.report.data_checks import Reading
from train.report.report import DataReport, DecisionReport, EvaluationReport
from train.set_metrics import MultiLabelAssessment, assess_sets

BATCH_TOKENS = 8192
# The smallest float32 above 0, and the distance of the largest one below 1 from 1.
_LEAST_SCORE, _LEAST_REST = 2.0**-149, 2.0**-24


def evaluate(
    adapter: Path,
    data: Dataset,
    *,
    backbone: str | None,
    device: str,
    dtype: ComputeType | None,
    progress: Progress,
) -> "Evaluation":
    """Measure an adapter file on labelled texts with the code that serves it.

    Args:
        backbone: None takes the one that the adapter names.
        dtype: None means float32 on a CPU and `auto` on a GPU.

    Raises:
        InvalidAdapter, IncompatibleAdapter: the file is unusable, or for another backbone.
        DataError: labels that the adapter does not know.
    """
    loaded = load_adapter(adapter)
    spec = loaded.spec
    check_label_kind(data, multi_label=spec.multi_label, known_to="the adapter")
    check_labels(data, spec.labels, known_to="the adapter")
    name = backbone or spec.backbone.name
    progress.note(f"loading the backbone {name}")
    model = load_backbone_on(name, device=device, dtype=dtype)
    prepared = prepare(loaded, model)
    started = time.perf_counter()
    encodings = encode(model, data, spec.max_length)
    scores = served_scores(prepared, model, encodings, progress)
    seconds = time.perf_counter() - started
    true, labels = classes_of(data, spec.labels), len(spec.labels)
    objective = OBJECTIVES[spec.activation]
    predicted = scores.argmax(dim=1)
    if spec.multi_label:
        predicted = scores.double() >= torch.tensor(spec.label_thresholds, dtype=torch.float64)
    report = EvaluationReport(
        adapter=str(adapter),
        revision=hashlib.sha256(adapter.read_bytes()).hexdigest(),
        metrics=objective.measure(predicted, true, labels=labels),
        majority=majority(objective, true, {"rows": true}, labels=labels)["rows"],
        data=DataReport.of(data),
        truncated=sum(encoding.truncated for encoding in encodings),
        reading=Reading.of(encodings, model.encoder, spec.max_length),
        seconds=seconds,
        texts_per_second=len(data) / seconds,
        assessment=_assessment(spec, scores, predicted, true),
        decision=None if spec.multi_label else _decision(spec, Judged(scores, true)),
    )
    cut = tuple(encoding.truncated for encoding in encodings)
    return Evaluation(report, spec, data, scores, predicted, cut)


def served_scores(
    prepared: PreparedAdapter,
    backbone: Backbone,
    encodings: Sequence[Encoding],
    progress: Progress,
) -> Tensor:
    """The scores of texts, by the code that serves them: float32 [texts, labels]."""
    cache = TrunkCache(backbone, encodings, prepared.shape, trunk_layers=0)
    scores = torch.empty(len(encodings), len(prepared.spec.labels))
    progress.begin("evaluate", texts=len(encodings))
    for chosen in cache.chunks(BATCH_TOKENS):
        batch = backbone.pack(rows_of([prepared], [(0, encodings[index]) for index in chosen]))
        for index, answer in zip(chosen, classify(backbone, batch, [prepared]), strict=True):
            scores[index] = torch.from_numpy(answer.scores)
        progress.advance(len(chosen))
    return scores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A report and the answers that it counts.

    scores: float32 [rows, labels], in the order of `spec.labels`. predicted: int64 [rows], or bool
    [rows, labels] where a text has a set of labels. cut: whether a text is not read whole.
    """

    report: EvaluationReport
    spec: AdapterSpec
    data: Dataset
    scores: Tensor
    predicted: Tensor
    cut: tuple[bool, ...]


def _assessment(
    spec: AdapterSpec, scores: Tensor, predicted: Tensor, true: Tensor
) -> Assessment | MultiLabelAssessment:
    """What a model card says about a split, from the scores that were served.

    The logits are those of the scores, times the temperature, up to a constant for each text. A
    float32 score of 0 or 1 stands for one as near to it as float32 can hold.
    """
    temperature = spec.calibration.temperature
    exact = scores.double().clamp_min(_LEAST_SCORE)
    if spec.multi_label:
        logits = exact.log() - (1 - exact).clamp_min(_LEAST_REST).log()
        return assess_sets(
            logits * temperature,
            true,
            spec.labels,
            thresholds=spec.label_thresholds,
            temperature=temperature,
            predicted=predicted,
        )
    return assess(exact.log() * temperature, true, spec.labels, temperature=temperature)


def _decision(spec: AdapterSpec, judged: Judged) -> DecisionReport:
    """What the adapter's threshold does on these rows, and what others would do."""
    below, declared = spec.abstain_below, spec.decision
    return DecisionReport(
        abstain_below=below,
        precision=None if declared is None else declared.precision,
        coverage=judged.curve(),
        answered={} if below is None else {"rows": judged.answered(below)},
    )
