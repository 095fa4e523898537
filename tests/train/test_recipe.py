"""What the recipe chooses where the settings leave it open."""

from typing import Any

import pytest

from train.config.defaults import settings_for
from train.config.recipe import MANY_LABELS, Recipe, recipe_of
from train.config.settings import FitSettings
from train.data.dataset import Dataset, Example, dataset_of
from train.metrics import Metric


def rows_with(labels: int) -> Dataset:
    examples = [
        Example(f"text {number}", None, f"label {number % labels}") for number in range(4 * labels)
    ]
    return dataset_of("rows", examples, sha256=None)


def recipe(method: str, labels: int, **given: Any) -> Recipe:
    settings = settings_for(method, FitSettings(**given))
    return recipe_of(method, settings, rows_with(labels), Metric.ACCURACY)


@pytest.mark.parametrize(
    ("method", "few", "many"),
    [
        ("idspam+vectors", (3e-4, 2e-3), (1e-3, 5e-3)),
        ("vectors", (1e-3, 2e-3), (1e-3, 5e-3)),
        ("idspam", (1e-3, None), (1e-3, None)),
        ("lora", (1e-3, None), (1e-3, None)),
    ],
)
def test_many_labels_have_rates_of_their_own(
    method: str, few: tuple[float, float | None], many: tuple[float, float | None]
) -> None:
    rates = [
        (found.learning_rate, found.tuning_rate)
        for found in (recipe(method, MANY_LABELS - 1), recipe(method, MANY_LABELS))
    ]
    assert rates == [pytest.approx(few), pytest.approx(many)]


@pytest.mark.parametrize("labels", [2, MANY_LABELS])
def test_a_rate_that_is_given_scales_both_rates(labels: int) -> None:
    usual = recipe("idspam+vectors", labels)
    given = recipe("idspam+vectors", labels, learning_rate=2 * usual.learning_rate)
    assert usual.tuning_rate is not None
    assert given.tuning_rate == pytest.approx(2 * usual.tuning_rate)


def test_a_rate_of_the_vectors_that_is_given_stays() -> None:
    given = recipe("idspam+vectors", MANY_LABELS, tuning_rate=1e-3)
    assert (given.learning_rate, given.tuning_rate) == pytest.approx((1e-3, 1e-3))
