"""The packed trainer is a plain padded PyTorch loop: on the same seed and data order both have the
same losses at every step and end with the same weights, to rounding.

The other side: Hugging Face's own model over padded batches (tests/support/padded_methods.py) and
plain AdamW.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.families import backbone_from, model_of, tokenizer_of
from tests.support.padded_methods import good_or_bad, pad, padded_logits
from train.config.settings import CacheMode, FitSettings, Preset
from train.data.dataset import Dataset
from train.fit.fit import Training, set_up
from train.loop.progress import Progress
from train.methods import METHODS
from train.metrics import Metric

# float32: sums of a batch in another order, carried on by 16 steps. Observed: losses 4e-7 and
# weights 2e-6 apart (IDPG's 1.4e-5), after steps that moved weights by 0.05. Another constant of
# the loop moves them by 4e-3 and more, which is tested below.
LOSS_BOUND = 5e-6
WEIGHT_BOUND = 5e-5
# Their steps are several times as large.
TUNING_BOUND = 3e-4

TRAIN, SELECTION = good_or_bad(60, seed=1), good_or_bad(12, seed=4)
SETTINGS = FitSettings(
    device="cpu",
    epochs=4,
    patience=4,
    batch_size=16,
    learning_rate=6e-3,
    warmup_ratio=0.2,
    weight_decay=0.1,
    dropout=0.0,
    hidden_dropout=0.0,
    seed=5,
)


@dataclass(frozen=True, slots=True)
class Constants:
    """What the loop has besides its settings."""

    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    clip_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class Trained:
    """losses: the mean of every step's batch. weights: after every epoch."""

    losses: list[float]
    weights: list[dict[str, Tensor]]


class Losses(Progress):
    """Every step's loss, out of the running means that a display is told."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._texts, self._total = 0, 0.0

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:  # noqa: ARG002  # Progress has it
        self._texts, self._total = 0, 0.0

    def advance(
        self,
        texts: int,
        *,
        loss: float | None = None,
        accuracy: float | None = None,  # noqa: ARG002  # Progress has it
    ) -> None:
        if loss is None:
            return
        self._texts += texts
        total = loss * self._texts
        self.steps.append((total - self._total) / texts)
        self._total = total


def prepared(
    method: str, settings: FitSettings, folder: Path, *, family: str, **sets: Dataset
) -> tuple[Training, dict[str, Tensor]]:
    """A run that is set up, and its initial weights. Without any dropout, PEFT's and BERT's own."""
    training = set_up(
        method,
        {"train": TRAIN} | sets,
        settings,
        backbone_from(model_of(family), tokenizer_of(family)),
        selection="selection",
        metric=Metric.ACCURACY,
        checkpoint_file=folder / "state",
        progress=Progress(),
    )
    for module in training.method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return training, training.method.snapshot()


def train_plainly(
    method: str,
    training: Training,
    start: Mapping[str, Tensor],
    *,
    family: str,
    data: Dataset = TRAIN,
    settings: FitSettings = SETTINGS,
    constants: Constants = Constants(),
) -> Trained:
    """From the same weights, with the same rates for the same tensors."""
    plain = model_of(family)
    tensors = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    assert settings.epochs is not None
    assert settings.batch_size is not None
    assert settings.learning_rate is not None
    rate, size = settings.learning_rate, settings.batch_size
    default_decay, set_decay = training.recipe.weight_decay, settings.weight_decay
    decay = default_decay if set_decay is None else set_decay
    tuning_rate = training.recipe.tuning_rate or rate
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [tensor],
                "lr": (tuning_rate if name.startswith("tuning.") else rate)
                * training.method.rate_factor(name),
            }
            | ({} if (own := training.method.decay(name)) is None else {"weight_decay": own})
            for name, tensor in tensors.items()
        ],
        betas=constants.betas,
        eps=constants.epsilon,
        weight_decay=decay,
    )
    steps = settings.epochs * math.ceil(len(data) / size)
    warmup = max(1, round(settings.warmup_ratio * steps))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (steps - step) / (steps - warmup)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    trained = Trained([], [])
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(data))
        for first in range(0, len(data), size):
            rows = order[first : first + size].tolist()
            logits = answers(method, plain, tensors, training, data=data, rows=rows)
            loss = functional.cross_entropy(logits, classes(data)[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(tensors.values(), constants.clip_norm)
            optimizer.step()
            schedule.step()
            trained.losses.append(float(loss.detach()))
        trained.weights.append({name: value.detach().clone() for name, value in tensors.items()})
    return trained


def answers(
    method: str,
    plain: Any,
    tensors: Mapping[str, Tensor],
    training: Training,
    *,
    data: Dataset,
    rows: list[int],
) -> Tensor:
    texts = [(data.examples[row].text, data.examples[row].text_pair) for row in rows]
    tokenizer = tokenizer_of(plain.config.model_type)
    batch = pad(plain, tokenizer, texts, max_length=training.method.design.max_length)
    return padded_logits(method, plain, tensors, training.method.design, batch)


def classes(data: Dataset) -> Tensor:
    return torch.tensor([data.labels.index(example.label) for example in data.examples])


@cache
def idspam_trained_plainly(preset: Preset, family: str) -> Trained:
    settings = replace(SETTINGS, preset=preset)
    training, start = prepared("idspam", settings, Path(), family=family)
    return train_plainly("idspam", training, start, family=family)


def compare(weights: Mapping[str, Tensor], losses: Losses, expected: Trained) -> None:
    np.testing.assert_allclose(losses.steps, expected.losses, rtol=0, atol=LOSS_BOUND)
    last = expected.weights[-1]
    for name in weights:
        bound = TUNING_BOUND if name.startswith("tuning.") else WEIGHT_BOUND
        assert apart({name: weights[name]}, {name: last[name]}) < bound, name


def apart(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert weights.keys() == expected.keys()
    return max(float((weights[name] - expected[name]).abs().max()) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(Preset))
@pytest.mark.parametrize(
    ("cache_mode", "micro_batch"),
    [(CacheMode.MEMORY, None), (CacheMode.OFF, None), (CacheMode.DISK, 5), (CacheMode.OFF, 5)],
)
def test_idspam_ends_where_a_plain_padded_loop_ends(
    preset: Preset, cache_mode: CacheMode, micro_batch: int | None, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, preset=preset, cache=cache_mode, micro_batch=micro_batch)
    training, start = prepared("idspam", settings, tmp_path, family="bert")
    losses = Losses()
    training.loop.fit(losses)
    training.close()
    weights = training.method.snapshot()
    compare(weights, losses, idspam_trained_plainly(preset, "bert"))
    # Far more than rounding has happened.
    assert min(losses.steps) < 0.9 * losses.steps[0]
    assert apart(weights, start) > 500 * WEIGHT_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(Preset))
def test_a_roberta_and_its_own_padding_are_trained_on_as_plainly(
    preset: Preset, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, preset=preset)
    training, _ = prepared("idspam", settings, tmp_path, family="roberta")
    losses = Losses()
    training.loop.fit(losses)
    expected = idspam_trained_plainly(preset, "roberta")
    compare(training.method.snapshot(), losses, expected)


# SMoP's router is noisy in training; what it computes otherwise is in test_methods_exactness.py.
@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "smop"])
def test_every_method_ends_where_a_plain_padded_loop_ends(method: str, tmp_path: Path) -> None:
    pairs = good_or_bad(30, seed=3, paired=True)
    rate = 2e-4 if METHODS[method].changes_backbone else 4e-3
    settings = replace(SETTINGS, epochs=3, learning_rate=rate)
    training, start = prepared(method, settings, tmp_path, family="bert", train=pairs)
    losses = Losses()
    training.loop.fit(losses)
    expected = train_plainly(method, training, start, family="bert", data=pairs, settings=settings)
    compare(training.method.snapshot(), losses, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["idspam", "fine-tuning"])
def test_the_weights_of_the_best_epoch_on_the_selection_rows_are_kept(
    method: str, tmp_path: Path
) -> None:
    """And its logits are those of a padded batch: whatever was kept for speed is up to date."""
    settings = replace(SETTINGS, learning_rate=2e-2 if method == "idspam" else 1e-3)
    training, start = prepared(method, settings, tmp_path, family="bert", selection=SELECTION)
    training.loop.fit(Progress())
    expected = train_plainly(method, training, start, family="bert", settings=settings)
    everything, true = list(range(len(SELECTION))), classes(SELECTION)
    scores = []
    for weights in expected.weights:
        with torch.no_grad():
            logits = answers(
                method, model_of("bert"), weights, training, data=SELECTION, rows=everything
            )
        hits = int((logits.argmax(dim=-1) == true).sum())
        scores.append((hits, -float(functional.cross_entropy(logits, true))))
    best = scores.index(max(scores))
    assert 0 < best < len(scores) - 1, "the first or last epoch would show less"
    assert training.loop.checkpoint.best_epoch == best + 1
    kept = training.method.snapshot()
    assert apart(kept, expected.weights[best]) < 0.1 * apart(kept, expected.weights[-1])
    with torch.no_grad():
        logits = answers(method, model_of("bert"), kept, training, data=SELECTION, rows=everything)
    torch.testing.assert_close(training.logits()["selection"], logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"betas": (0.9, 0.999)},
        {"betas": (0.95, 0.98)},
        {"epsilon": 1e-8},
        {"clip_norm": 2.0},
        {"weight_decay": 0.0},
        {"warmup_ratio": 0.1},
        {"seed": 6},
    ],
    ids=str,
)
def test_the_comparison_would_notice_another_loop(change: dict[str, Any]) -> None:
    training, start = prepared("idspam", SETTINGS, Path(), family="bert")
    known = {name: value for name, value in change.items() if hasattr(Constants(), name)}
    settings = {name: value for name, value in change.items() if name not in known}
    other = train_plainly(
        "idspam",
        training,
        start,
        family="bert",
        settings=replace(SETTINGS, **settings),
        constants=Constants(**known),
    )
    right = idspam_trained_plainly(SETTINGS.preset, "bert")
    assert apart(right.weights[-1], other.weights[-1]) > 10 * WEIGHT_BOUND
