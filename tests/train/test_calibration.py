"""The temperature: kept only where scores come nearer to the truth, and never a worse one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.calibration import LEAST_ROWS, TEMPERATURES, calibrate
from train.metrics import BINS, calibration_error
from train.objective import OBJECTIVES

ONE, SETS = OBJECTIVES["softmax"], OBJECTIVES["sigmoid"]


def _drawn(
    rows: int, labels: int, *, scale: float, sharper: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Logits and classes that are drawn from their softmax, then `sharper` times the logits."""
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, labels, generator=random)
    classes = torch.multinomial(logits.softmax(dim=-1), 1, generator=random)[:, 0]
    return sharper * logits, classes


def _error(logits: Tensor, classes: Tensor, temperature: float) -> float:
    scores, right = ONE.promises(logits / temperature, classes)
    return calibration_error(scores.numpy(), right.numpy())


def test_the_calibration_error_is_the_distance_in_each_bin() -> None:
    scores = torch.tensor([0.9, 0.92, 0.5, 0.52]).double()
    right = torch.tensor([True, True, True, False])
    # Two bins of two scores each: 0.91 promised and 1 true, 0.51 promised and 0.5 true.
    expected = (2 * 0.09 + 2 * 0.01) / 4
    assert BINS == 15
    assert calibration_error(scores.numpy(), right.numpy()) == pytest.approx(expected)


@pytest.mark.parametrize("sharper", [0.25, 4.0])
def test_scores_that_are_too_sure_or_too_modest_are_mended(sharper: float) -> None:
    chosen = calibrate(ONE, *_drawn(2000, 5, scale=2.0, sharper=sharper, seed=1))
    assert chosen.temperature == pytest.approx(sharper, rel=0.15)
    assert chosen.kept
    assert chosen.after < chosen.before / 3
    fresh = _drawn(2000, 5, scale=2.0, sharper=sharper, seed=2)
    assert _error(*fresh, chosen.temperature) < _error(*fresh, 1.0) / 3


def test_sets_of_labels_are_calibrated_over_all_decisions() -> None:
    random = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(800, 4, generator=random)
    true = torch.bernoulli(logits.sigmoid(), generator=random)
    chosen = calibrate(SETS, 3 * logits, true)
    assert chosen.temperature == pytest.approx(3.0, rel=0.15)
    assert chosen.after < chosen.before / 3


@given(
    rows=st.integers(1, 120),
    labels=st.integers(2, 6),
    scale=st.sampled_from([0.0, 0.3, 2.0, 20.0]),
    sharper=st.sampled_from([0.1, 0.7, 1.0, 1.5, 10.0]),
    sets=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_the_reported_error_never_gets_worse(
    rows: int, labels: int, scale: float, sharper: float, sets: bool, seed: int
) -> None:
    logits, classes = _drawn(rows, labels, scale=scale, sharper=sharper, seed=seed)
    objective, true = ONE, classes
    if sets:
        objective, true = SETS, torch.nn.functional.one_hot(classes, labels).float()
    chosen = calibrate(objective, logits, true)
    assert chosen.after <= chosen.before
    assert chosen.temperature in (1.0, chosen.fitted)
    assert chosen.temperature in TEMPERATURES
    # Nor does that of the rows themselves, which a card shows at both temperatures.
    plain, scaled = (
        calibration_error(*(part.numpy() for part in objective.promises(logits / t, true)))
        for t in (1.0, chosen.temperature)
    )
    assert scaled <= plain
    if chosen.kept:
        assert chosen.after == chosen.cross_fitted
        assert chosen.after < chosen.before
    assert calibrate(objective, logits, true) == chosen


def test_a_temperature_that_fits_the_noise_of_few_rows_is_seldom_kept() -> None:
    """Scores that need none, and 40 rows: nearly every fitted temperature is a loss elsewhere."""
    fresh = _drawn(20_000, 3, scale=1.5, sharper=1.0, seed=1000)
    plain = _error(*fresh, 1.0)
    chosen = [calibrate(ONE, *_drawn(40, 3, scale=1.5, sharper=1.0, seed=n)) for n in range(40)]
    raised = sum(_error(*fresh, each.temperature) > plain for each in chosen)
    raised_always = sum(_error(*fresh, each.fitted or 1.0) > plain for each in chosen)
    assert raised_always > 30
    assert raised < 10


def test_rows_without_a_mistake_do_not_ask_for_scores_of_one() -> None:
    random = torch.Generator().manual_seed(1)
    classes = torch.randint(2, (60,), generator=random)
    logits = 4.0 * torch.nn.functional.one_hot(classes, 2) + torch.rand(60, 2, generator=random)
    chosen = calibrate(ONE, logits, classes)
    assert chosen.fitted is not None
    assert chosen.fitted < 0.25
    assert chosen.temperature == 1.0


@pytest.mark.parametrize("rows", [1, 2, LEAST_ROWS - 1])
def test_too_few_rows_fit_no_temperature(rows: int) -> None:
    chosen = calibrate(ONE, *_drawn(rows, 3, scale=2.0, sharper=5.0, seed=1))
    assert (chosen.temperature, chosen.fitted, chosen.cross_fitted) == (1.0, None, None)
    assert chosen.after == chosen.before


def test_rows_that_are_all_alike_keep_their_scores() -> None:
    chosen = calibrate(ONE, torch.zeros(50, 3), torch.arange(50) % 3)
    assert (chosen.temperature, chosen.fitted) == (1.0, 1.0)
