"""Rows that are labelled wrong, planted among rows of the default backbone, are found first."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone
from adapters.format.spec import Pooling
from train.config.defaults import design_of
from train.config.settings import FitSettings
from train.data.dataset import Dataset, Example, Label
from train.data.repeats import find_repeats
from train.loop.encoded_splits import classes_of, encode
from train.loop.trunk_cache import TrunkCache
from train.methods import build
from train.objective import OBJECTIVES, Activation
from train.report.linear_head import features_of
from train.report.suspects import Suspect, find_suspects

ROWS = 240
SHARE = 0.05

SUBJECTS = {
    "parcel": ("the parcel", "my delivery", "the package from Leeds", "a box that I ordered"),
    "card": ("my bank card", "the credit card", "my debit card", "the card of my wife"),
    "flight": ("my flight", "the plane to Oslo", "our booking for two seats", "the ticket"),
}
FAULTS = ("was delayed", "has not arrived", "got lost", "is not what I paid for", "was refused")
ENDINGS = ("again", "since Monday", "and nobody answers", "for the third time", "this morning")


def _example(draw: random.Random, label: str) -> Example:
    parts = (draw.choice(SUBJECTS[label]), draw.choice(FAULTS), draw.choice(ENDINGS))
    return Example(f"{' '.join(parts)} {draw.randint(1, 999)}", None, label)


def _one_label(draw: random.Random) -> Dataset:
    return _dataset([_example(draw, draw.choice(list(SUBJECTS))) for _ in range(ROWS)])


def _pairs(draw: random.Random) -> Dataset:
    """Whether the second text is about the first one's subject is the label."""
    rows = []
    for _ in range(ROWS):
        one = draw.choice(list(SUBJECTS))
        first, second = _example(draw, one), _example(draw, one)
        rows.append(Example(first.text, second.text, one))
    return _dataset(rows)


def _sets(draw: random.Random) -> Dataset:
    rows = []
    for _ in range(ROWS):
        labels = tuple(sorted(label for label in SUBJECTS if draw.random() < 0.4))
        texts = [_example(draw, label).text for label in labels] or ["nothing to report today"]
        rows.append(Example("; ".join(texts), None, labels))
    return _dataset(rows)


def _dataset(rows: list[Example]) -> Dataset:
    return Dataset("rows", "0" * 64, tuple(rows))


def _planted(data: Dataset, draw: random.Random) -> tuple[Dataset, set[int]]:
    """The same rows, a share of them with a wrong label or a wrong set of labels."""
    wrong = set(draw.sample(range(len(data)), round(SHARE * len(data))))
    rows = list(data.examples)
    for row in wrong:
        given: Label = rows[row].label
        if isinstance(given, str):
            given = draw.choice([label for label in SUBJECTS if label != given])
        else:
            given = tuple(sorted({*given} ^ {draw.choice(list(SUBJECTS))}))
        rows[row] = replace(rows[row], label=given)
    return replace(data, examples=tuple(rows)), wrong


@pytest.fixture(scope="module")
def default_backbone() -> Backbone:
    return load_backbone(device="cpu", dtype="float32")


def _suspects(data: Dataset, backbone: Backbone) -> tuple[Suspect, ...]:
    activation: Activation = "sigmoid" if data.multi_label else "softmax"
    design = replace(design_of("idspam", FitSettings(), backbone), activation=activation)
    method = build("idspam", backbone, design, data.labels, torch.Generator().manual_seed(0))
    cache = TrunkCache(
        backbone,
        encode(backbone, data, design.max_length),
        method.shape,
        trunk_layers=method.trunk_layers,
    )
    list(cache.fill())
    return find_suspects(
        OBJECTIVES[activation],
        activation,
        features_of(backbone, {"train": cache})[Pooling.MEAN]["train"],
        classes_of(data, data.labels),
        find_repeats({"train": data}).groups,
        labels=len(data.labels),
        seed=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [_one_label, _pairs, _sets])
def test_planted_mistakes_come_first(
    default_backbone: Backbone, make: Callable[[random.Random], Dataset]
) -> None:
    draw = random.Random(3)
    data, wrong = _planted(make(draw), draw)
    ranked = _suspects(data, default_backbone)
    assert sorted(suspect.row for suspect in ranked) == list(range(ROWS))
    first = {suspect.row for suspect in ranked[: ROWS // 10]}
    assert len(first & wrong) >= 0.6 * len(wrong)
    likely = {suspect.row for suspect in ranked if suspect.likely}
    assert len(likely & wrong) >= 0.6 * len(wrong)
    assert len(likely - wrong) <= len(wrong)
    # The suggestion is what the text says.
    clean = make(random.Random(3))
    suggested = {
        suspect.row: tuple(data.labels[index] for index in suspect.suggested) for suspect in ranked
    }
    right = [suggested[row] == clean.examples[row].labels for row in first & wrong]
    assert sum(right) >= 0.8 * len(right)


def _ranked(classes: torch.Tensor, groups: list[int], labels: int) -> tuple[Suspect, ...]:
    features = torch.nn.functional.one_hot(classes, labels).float() + 0.01
    return find_suspects(
        OBJECTIVES["softmax"], "softmax", features, classes, groups, labels=labels, seed=1
    )


def test_a_label_of_few_texts_cannot_be_judged() -> None:
    classes = torch.tensor([0, 1] * 20 + [2, 2, 2, 2, 2, 2])
    # Six rows of the rare label, but four texts.
    groups = [*range(40), 40, 40, 41, 42, 43, 43]
    ranked = _ranked(classes, groups, 3)
    assert {suspect.row for suspect in ranked[-6:]} == set(range(40, 46))
    assert not any(suspect.likely for suspect in ranked)


def test_rows_of_one_text_do_not_vouch_for_each_other() -> None:
    """Ten copies of one text with the wrong label are as suspicious as one."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(100) % 2
    features = torch.randn(100, 4, generator=generator) * 0.1
    features[:, 0] += classes * 2.0 - 1.0
    features[:10] = features[1]
    classes[:10] = 0
    for groups, expected in ((list(range(100)), False), ([0] * 10 + list(range(1, 91)), True)):
        ranked = find_suspects(
            OBJECTIVES["softmax"], "softmax", features, classes, groups, labels=2, seed=1
        )
        assert ({suspect.row for suspect in ranked[:10]} == set(range(10))) is expected
