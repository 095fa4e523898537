"""`evaluate`: measure an adapter file on labelled texts with the code that serves it."""

import hashlib
import time
from pathlib import Path

import torch

from adapters.adapter import classify, prepare, rows_of
from adapters.format.files import load_adapter
from train.config.defaults import load_backbone_for
from train.config.settings import ComputeType, FitSettings
from train.data.dataset import Dataset, check_labels
from train.loop.encoded_splits import classes_of, encode
from train.loop.progress import Progress
from train.loop.trunk_cache import TrunkCache
from train.metrics import measure
from train.report.baselines import majority
from train.report.report import DataReport, EvaluationReport

BATCH_TOKENS = 8192


def evaluate(
    adapter: Path,
    data: Dataset,
    *,
    backbone: str | None,
    device: str,
    dtype: ComputeType | None,
    progress: Progress,
) -> EvaluationReport:
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
    check_labels(data, spec.labels, known_to="the adapter")
    name = backbone or spec.backbone.name
    model = load_backbone_for(FitSettings(backbone=name, device=device, dtype=dtype))
    prepared = prepare(loaded, model)
    started = time.perf_counter()
    encodings = encode(model, data, spec.max_length)
    cache = TrunkCache(model, encodings, spec, trunk_layers=0)
    predicted = torch.empty(len(data), dtype=torch.int64)
    progress.begin("evaluate", texts=len(data))
    for chosen in cache.chunks(BATCH_TOKENS):
        batch = model.pack(rows_of([prepared], [(0, encodings[index]) for index in chosen]))
        for index, answer in zip(chosen, classify(model, batch, [prepared]), strict=True):
            predicted[index] = int(answer.scores.argmax())
        progress.advance(len(chosen))
    seconds = time.perf_counter() - started
    true = classes_of(data, spec.labels)
    return EvaluationReport(
        adapter=str(adapter),
        revision=hashlib.sha256(adapter.read_bytes()).hexdigest(),
        metrics=measure(predicted, true, labels=len(spec.labels)),
        majority=majority(true, {"rows": true}, labels=len(spec.labels))["rows"],
        data=DataReport.of(data),
        truncated=sum(encoding.truncated for encoding in encodings),
        seconds=seconds,
        texts_per_second=len(data) / seconds,
    )
