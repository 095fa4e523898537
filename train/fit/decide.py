"""From the logits of the validation rows to scores and answers: what is chosen after the training.

Temperature and thresholds are chosen on the logits of the weights that are stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adapters.format.spec import Decision
from train.abstaining import CONFIDENCE, Answered, Judged, least_rows
from train.calibration import Calibrated, calibrate
from train.config.settings import FitSettings
from train.data.dataset import Dataset
from train.errors import SettingsError
from train.objective import Objective
from train.report.report import DecisionReport
from train.thresholds import choose_thresholds

VALIDATION = "validation"


@dataclass(frozen=True, slots=True)
class Scoring:
    """How logits become scores and sets of labels.

    calibrated: None without validation rows or calibration. thresholds: of sets of labels, if they
    were chosen.
    """

    calibrated: Calibrated | None
    thresholds: tuple[float, ...] | None

    @property
    def temperature(self) -> float:
        return 1.0 if self.calibrated is None else self.calibrated.temperature


def choose_scoring(
    objective: Objective,
    logits: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    settings: FitSettings,
) -> Scoring:
    """Temperature and thresholds, chosen on the validation rows if there are any.

    Args:
        logits, classes: by split.
    """
    if not settings.calibration or VALIDATION not in logits:
        return Scoring(None, None)
    scores, true = logits[VALIDATION], classes[VALIDATION]
    calibrated = calibrate(objective, scores, true)
    thresholds = None
    if true.dim() == 2:
        thresholds = choose_thresholds(scores / calibrated.temperature, true)
    return Scoring(calibrated, thresholds)


def check_decision(sets: Mapping[str, Dataset], settings: FitSettings) -> None:
    """Refuse before the training what no trained weights could meet.

    Raises:
        SettingsError: `--precision` or `--abstain-below` cannot be used on this data.
    """
    precision, below = settings.precision, settings.abstain_below
    if precision is None and below is None:
        return
    flag = "--precision" if below is None else "--abstain-below"
    train, validation = sets["train"], sets.get(VALIDATION)
    if train.multi_label:
        raise SettingsError(
            [
                f"{flag} is for one label a text, {train.source} has several: each label has a "
                "threshold of its own, and an empty set is an answer"
            ]
        )
    if below is not None and below <= (least := 1 / len(train.labels)):
        raise SettingsError(
            [
                f"{flag} {below:g} never abstains: the best of {len(train.labels)} labels always "
                f"has a score of at least {least:.4g}"
            ]
        )
    if precision is None:
        return
    if validation is None:
        raise SettingsError([f"{flag} is judged on validation rows, and there are none"])
    if len(validation) < (needed := least_rows(precision)):
        raise SettingsError(
            [
                f"{flag} {precision:g} needs at least {needed:,} validation rows to be shown with "
                f"{CONFIDENCE:.0%} confidence, there are {len(validation):,}"
            ]
        )


def decide(
    logits: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    settings: FitSettings,
    *,
    temperature: float,
) -> DecisionReport | None:
    """When an adapter for one label a text abstains, and what that costs on every split.

    Args:
        logits, classes: by split. None without any.

    Raises:
        SettingsError: no threshold reaches `settings.precision`.
    """
    judged = {
        name: Judged.of_logits(logits[name], classes[name], temperature=temperature)
        for name in logits
    }
    below, precision = settings.abstain_below, settings.precision
    if precision is not None:
        validation = judged[VALIDATION]
        below = validation.threshold(precision)
        if below is None:
            raise SettingsError([_out_of_reach(precision, validation)])
    curve: Sequence[Answered] = judged[VALIDATION].curve() if VALIDATION in judged else ()
    if below is None and not curve:
        return None
    return DecisionReport(
        abstain_below=below,
        precision=precision,
        coverage=tuple(curve),
        answered={}
        if below is None
        else {name: rows.answered(below) for name, rows in judged.items()},
    )


def decision_of(report: DecisionReport | None) -> Decision | None:
    """What the adapter file says."""
    if report is None:
        return None
    return Decision(
        abstain_below=report.abstain_below,
        precision=report.precision,
        coverage=tuple(
            (point.threshold, round(point.coverage, 6), round(point.accuracy or 0.0, 6))
            for point in report.coverage
        ),
    )


def _out_of_reach(precision: float, validation: Judged) -> str:
    highest = validation.highest_precision()
    reached = "none is" if highest is None else f"the highest that is reached is {highest:.2f}"
    return (
        f"--precision {precision:g}: on the {validation.rows:,} validation rows no threshold "
        f"reaches it with {CONFIDENCE:.0%} confidence; {reached}"
    )
