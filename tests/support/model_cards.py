"""A model card's facts without a run, and what a renderer makes of the card."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

from adapters.backbone.loading import DEFAULT_BACKBONE
from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    BackboneIdentity,
    Calibration,
    Provenance,
)
from train.loop.progress import EpochReport
from train.metrics import Assessment, Metrics, assess
from train.report.model_card import CardFacts
from train.report.report import Baseline, DataReport, FitReport

EPOCH_REPORT = EpochReport(3, 0.25, 0.9, 0.8, 1.5, 1234.0)
GOOD, BAD = Metrics(0.9, 0.85, 0.8), Metrics(0.5, 0.3, 0.0)
FIT_REPORT = FitReport(
    output="runs/My Task.safetensors",
    card="runs/My Task.md",
    validation=GOOD,
    test=None,
    majority=Baseline(BAD, None),
    head_only=Baseline(Metrics(0.8, 0.7, 0.6), None),
    trainable_parameters=1234,
    seconds=61.5,
    seconds_per_epoch=2.0,
    epochs=(EPOCH_REPORT,),
    best_epoch=3,
    temperature=1.5,
    settings={"lr": 1e-3},
    data={"train": DataReport("a.csv", "0" * 64, 2, {"x": 1, "y": 1})},
    cache={"mode": "memory", "bytes": 10, "seconds": 0.1},
    assessments={},
    trials=(),
    command=None,
)


def assessment_of(labels: Sequence[str], *, rows: int = 60, right: float = 0.8) -> Assessment:
    random = torch.Generator().manual_seed(1)
    classes = torch.arange(rows) % len(labels)
    answers = torch.where(torch.rand(rows, generator=random) < right, classes, 0)
    logits = torch.randn(rows, len(labels), generator=random)
    logits[torch.arange(rows), answers] += 5
    return assess(logits, classes, labels, temperature=1.5)


def facts_of(labels: Sequence[str] = ("ham", "spam"), *, rows: int = 60) -> CardFacts:
    spec = AdapterSpec(
        backbone=BackboneIdentity(name=DEFAULT_BACKBONE, fingerprint="1" * 64),
        tokenizer_sha256="2" * 64,
        hidden_size=32,
        prompt=AttentionPrompt(length=10, layer=3, bottleneck=34, attention_size=32),
        labels=("ham", "spam"),
        max_length=128,
        calibration=Calibration(temperature=1.5),
        provenance=Provenance(data="My data", data_licence="CC BY 4.0", code_version="0.3.0"),
    )
    # Unchecked: a card must hold any label, also those that a spec refuses.
    spec = spec.model_copy(update={"labels": tuple(labels)})
    counts = {label: 10 + index for index, label in enumerate(labels)}
    control = Metrics(0.1, 0.1, 0.0)
    report = replace(
        FIT_REPORT,
        validation=control,
        test=control,
        majority=Baseline(control, control),
        head_only=Baseline(control, control),
        data={
            split: DataReport(f"{split}.csv", "0" * 64, sum(counts.values()), counts)
            for split in ("train", "validation", "test")
        },
        command="python -m train fit --train a.csv --output x.safetensors",
    )
    return CardFacts(
        report=report,
        spec=spec,
        assessments={split: assessment_of(labels, rows=rows) for split in ("validation", "test")},
        file_name="My Task.safetensors",
        file_size=123_456,
        revision="a" * 64,
        machine="two CPU cores",
        versions={"python": "3.11", "torch": "2.13.0"},
        paired=False,
    )


def parsed(card: str) -> list[Token]:
    """What a renderer makes of the card below its front matter, HTML being allowed."""
    body = card.partition("\n---\n")[2]
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)


def fences(card: str) -> list[str]:
    return [token.content for token in parsed(card) if token.type == "fence"]
