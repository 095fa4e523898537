"""Kept answers, paired bootstraps over them, and the sentence that a comparison ends in."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.experiments import cell_named, failed, finished
from train.data.dataset import Dataset, Example
from train.experiments.advice import Candidate, advice
from train.experiments.answers import packed, unpacked
from train.experiments.cells import Outcome, TaskSplits
from train.experiments.differences import Spread, Spreads, mean_spread
from train.experiments.tables import difference_cell, mean_difference_cell
from train.metrics import Metric, draw_rows, measure, resampled_metrics
from train.set_metrics import measure_sets, resampled_set_metrics

ROWS = 300


@pytest.mark.parametrize(
    "predicted",
    [
        torch.tensor([3, 0, 150, 7]),
        torch.tensor([[True, False, True], [False, False, False], [False, True, False]]),
    ],
)
def test_answers_are_kept_as_one_text(predicted: torch.Tensor) -> None:
    several = predicted.dtype == torch.bool
    text = packed(predicted)
    assert torch.equal(unpacked(text, labels=3, several=several), predicted)
    assert text == ("0+2 - 1" if several else "3 0 150 7")


def test_resampled_figures_are_those_of_the_drawn_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    true = torch.randint(4, (50,), generator=generator)
    predicted = torch.where(torch.rand(50, generator=generator) < 0.6, true, 0)
    sets, given = (torch.rand(2, 50, 3, generator=generator) < 0.4).unbind()
    rows = torch.from_numpy(np.concatenate(list(draw_rows(50, seed=7))))
    figures = resampled_metrics(predicted, true, labels=4, seed=7)
    of_sets = resampled_set_metrics(given, sets, seed=7)
    assert len(figures) == len(of_sets) == len(rows)
    for draw in (0, 1, 500, 999):
        expected = measure(predicted[rows[draw]], true[rows[draw]], labels=4)
        assert vars_of(figures[draw]) == pytest.approx(vars_of(expected))
        expected_sets = measure_sets(given[rows[draw]], sets[rows[draw]])
        assert vars_of(of_sets[draw]) == pytest.approx(vars_of(expected_sets), abs=1e-6)


def vars_of(metrics: object) -> list[float]:
    return [getattr(metrics, name) for name in metrics.__slots__]  # type: ignore[attr-defined]


def _splits(true: list[int]) -> dict[str, TaskSplits]:
    rows = tuple(Example(str(index), None, "ab"[label]) for index, label in enumerate(true))
    data = Dataset("rows", "0" * 64, rows)
    splits = {"train": data, "selection": data, "validation": data}
    return {"rte": TaskSplits.of(splits, Metric.ACCURACY)}


def _outcome(method: str, seed: int, answers: list[int], true: list[int]) -> Outcome:
    share = float(np.mean([one == other for one, other in zip(answers, true, strict=True)]))
    outcome = finished(cell_named(method=method, seed=seed), share)
    assert outcome.report is not None
    kept = {"validation": packed(torch.tensor(answers))}
    return replace(outcome, report=replace(outcome.report, answers=kept))


def _spreads(answers: dict[str, list[list[int]]], true: list[int]) -> dict[str, Spread]:
    """Scores of methods; answers: by method, of each seed."""
    spreads, found = Spreads(_splits(true)), {}
    for method, by_seed in answers.items():
        ended = [_outcome(method, seed, each, true) for seed, each in enumerate(by_seed)]
        outcomes = {outcome.cell.key: outcome for outcome in ended}
        spread = spreads.of([outcome.cell for outcome in ended], outcomes, "validation")
        assert isinstance(spread, Spread)
        found[method] = spread
    return found


def test_a_method_that_only_corrects_another_is_better_by_more_than_chance() -> None:
    """Unpaired, both intervals overlap by far: 70 % and 74 % of 300 rows."""
    draw = np.random.default_rng(0)
    true = draw.integers(2, size=ROWS).tolist()
    wrong = [1 - label if row < 90 else label for row, label in enumerate(true)]
    better = [1 - label if row < 78 else label for row, label in enumerate(true)]
    other = [1 - label if 110 <= row < 188 else label for row, label in enumerate(true)]
    found = _spreads({"a": [wrong], "b": [better], "c": [other], "d": [wrong]}, true)
    gain = found["b"].minus(found["a"])
    assert gain.value == pytest.approx(0.04)
    assert gain.is_real
    # As many rows right as `b`, but other ones than `a`.
    assert not found["c"].minus(found["a"]).is_real
    same = found["d"].minus(found["a"])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert found["a"].minus(found["b"]).high == -gain.low


def test_seeds_that_disagree_make_the_interval_wide() -> None:
    draw = np.random.default_rng(0)
    true = draw.integers(2, size=ROWS).tolist()

    def wrong_until(end: int) -> list[int]:
        return [1 - label if row < end else label for row, label in enumerate(true)]

    found = _spreads(
        {
            "steady": [wrong_until(80)] * 3,
            "base": [wrong_until(92)] * 3,
            "fickle": [wrong_until(20), wrong_until(110), wrong_until(110)],
        },
        true,
    )
    assert found["fickle"].value == pytest.approx(found["steady"].value)
    assert found["steady"].minus(found["base"]).is_real
    assert not found["fickle"].minus(found["base"]).is_real


@pytest.mark.slow
def test_chance_is_rarely_called_a_difference() -> None:
    """Two methods that are right in 70 % of the rows, independently: about 5 % of all intervals."""
    draw = np.random.default_rng(3)
    true, real = [0] * 60 + [1] * 60, 0
    for _ in range(60):
        answers = {
            name: [[label ^ int(draw.random() < 0.3) for label in true]] for name in ("a", "b")
        }
        found = _spreads(answers, true)
        real += found["a"].minus(found["b"]).is_real
    assert real <= 9


def test_a_cell_says_why_there_is_no_difference() -> None:
    spread = Spread(0.8, np.full(1001, 0.8))
    lower = Spread(0.75, np.linspace(0.7405, 0.7595, 1001))
    assert difference_cell(spread, lower) == "**+5.0 (4.1 to 5.9)**"
    assert difference_cell(spread, "not run yet") == "not run yet"
    assert mean_difference_cell([(spread, lower), ("failed", lower)]) == "1 of 2 tasks"
    assert mean_difference_cell([(spread, lower)] * 2) == "**+5.0 (4.1 to 5.9)**"
    cell = cell_named()
    spreads = Spreads(_splits([0, 1]))
    assert spreads.of([cell], {}, "validation") == "not run yet"
    assert spreads.of([cell], {cell.key: failed(cell)}, "validation") == "failed"
    old = finished(cell, 0.5)
    assert spreads.of([cell], {cell.key: old}, "validation") == "no answers kept"
    without = old.to_json().replace(',\n    "answers": {}', "")
    assert "answers" not in without
    assert Outcome.from_json(without) == old


def _candidate(method: str, parameters: int, *scores: float, width: float = 0.01) -> Candidate:
    """Scores of tasks `one`, `two` and so on, with intervals of about four times `width`."""
    noise = np.random.default_rng(parameters).normal(0, width, size=(len(scores), 1000))
    return Candidate(
        method,
        {
            name: Spread(score, score + each)
            for name, score, each in zip(("one", "two"), scores, noise, strict=False)
        },
        parameters,
    )


def test_advice_is_the_smallest_method_that_cannot_be_told_apart_from_the_best() -> None:
    head, lora = _candidate("head-only", 10, 0.7, 0.7), _candidate("lora", 2000, 0.8, 0.8)
    vectors = _candidate("vectors", 1000, 0.794, 0.8)
    assert advice([head, lora, vectors], 0.5) == (
        "Take vectors (1,000 trained parameters): on average over the tasks lora is 0.3 points "
        "better, which is not more than chance, and vectors is the smallest that cannot be told "
        "apart from it."
    )
    assert advice([head, lora], 0.5) == (
        "Take lora (2,000 trained parameters): on average over the tasks it is better than each of "
        "the others by more than chance."
    )
    level = _candidate("head-only", 10, 0.81)
    alone = advice([level, _candidate("lora", 2000, 0.8), _candidate("lpt", 3000, 0.805)], 0.5)
    assert alone == (
        "Take head-only (10 trained parameters): on one none is better, and lora and lpt, which "
        "are larger, cannot be told apart from it."
    )


def test_advice_names_what_speaks_against_it() -> None:
    vectors, lora = _candidate("vectors", 1000, 0.9, 0.7), _candidate("lora", 2000, 0.78, 0.8)
    tuned = replace(_candidate("fine-tuning", 10**6, 0.9, 0.9), served=False)
    said = advice([vectors, lora, tuned], 0.5)
    assert said.startswith("Take vectors (1,000 trained parameters): ")
    assert "; but lora is 10.0 better on two; " in said
    assert said.endswith("; fine-tuning, which cannot be served, is 10.0 points better.")
    assert advice([tuned], 0.5).startswith("None of these methods can be served")


def test_no_method_is_advised_that_does_not_beat_a_constant_answer() -> None:
    said = advice([_candidate("lora", 2000, 0.51, 0.5), _candidate("lpt", 10, 0.4, 0.4)], 0.5)
    assert said.startswith("Take none of these methods yet: the best one, lora, does not beat")
    for text in (said, advice([_candidate("a", 1, 0.9), _candidate("b", 2, 0.8)], 0.5)):
        assert text.count(". ") == 0
        assert text.endswith(".")


def test_the_mean_over_tasks_is_surer_than_one_task() -> None:
    one = _candidate("lora", 5, 0.8, 0.8, width=0.02)
    wide = [float(np.std(score.drawn)) for score in one.scores.values()]
    mean = mean_spread(list(one.scores.values()))
    assert float(np.std(mean.drawn)) < min(wide)
    assert mean.value == pytest.approx(0.8)
