"""Training rows that are probably labelled wrong, by a head that has not seen them.

Every row is scored by a linear head on the frozen backbone that was fitted to the other folds. A
row is suspect where that head is sure of another answer: confident learning (Northcutt, Jiang and
Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.packed.head import scores
from train.objective import Activation, Objective
from train.report.linear_head import LinearHead

FOLDS = 5
# More freedom or more steps would fit the wrong labels as well: of 5 % wrong labels planted in
# rows of real tasks, these find the most.
PENALTY, ITERATIONS = 0.1, 15

_Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A training row as a head sees it that was fitted to other rows.

    row: its position. suggested: the answer of that head, positions of labels. confidence: the
    score of the row's own answer: of its label, or of the worst of its decisions about a label.
    other: the score of the best other answer. likely: whether it is probably labelled wrong.
    """

    row: int
    suggested: tuple[int, ...]
    confidence: float
    other: float
    likely: bool


def find_suspects(
    objective: Objective,
    activation: Activation,
    features: Tensor,
    true: Tensor,
    groups: Sequence[int],
    *,
    labels: int,
    seed: int,
) -> tuple[Suspect, ...]:
    """All rows, most suspicious first.

    Labels with texts in fewer than `FOLDS` groups cannot be judged: rows of such a label come last
    and are not suspect.

    Args:
        features: float32 [rows, n].
        true: as `classes_of` gives it.
        groups: of each row; rows with the same number are never used to judge each other.
    """
    given = true.numpy() > 0 if true.dim() == 2 else np.eye(labels, dtype=bool)[true.numpy()]
    folds = _folds(given, np.asarray(groups), seed=seed)
    shares = _out_of_fold(objective, activation, features, true, folds, labels=labels)
    judged = _judged(given, np.asarray(groups))
    if true.dim() == 2:
        found = _of_sets(shares, given, judged)
    else:
        found = _of_one_label(shares, true.numpy(), judged)
    return tuple(sorted(found, key=lambda each: (each.confidence - each.other, each.row)))


def _folds(given: _Array, groups: _Array, *, seed: int) -> _Array:
    """A fold for each row, int64 [rows]: each has the same share of every label, nearly.

    Rows of one group are in one fold. Groups are dealt out in the order of their first labels.
    """
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(first))
    order = shuffled[np.argsort(given[first[shuffled]].argmax(axis=1), kind="stable")]
    folds = np.empty(len(first), dtype=np.int64)
    folds[order] = np.arange(len(first)) % FOLDS
    return folds[member.ravel()]


def _out_of_fold(
    objective: Objective,
    activation: Activation,
    features: Tensor,
    true: Tensor,
    folds: _Array,
    *,
    labels: int,
) -> _Array:
    """Every row's scores by a head that was fitted to the other folds: float64 [rows, labels]."""
    shares = torch.full((len(features), labels), 1 / labels)
    for fold in np.unique(folds):
        inside = torch.from_numpy(folds == fold)
        if bool(inside.all()):
            break
        head = LinearHead.fit(
            objective,
            features[~inside],
            true[~inside],
            labels=labels,
            penalty=PENALTY,
            iterations=ITERATIONS,
        )
        shares[inside] = scores(head.logits(features[inside]), activation)
    return shares.double().numpy()


def _judged(given: _Array, groups: _Array) -> _Array:
    """Which labels have texts in enough groups: bool [labels]."""
    return np.array([len(np.unique(groups[column])) >= FOLDS for column in given.T])


def _of_one_label(shares: _Array, true: _Array, judged: _Array) -> list[Suspect]:
    """Likely wrong: another label's score is as high as is usual for rows that have that label.

    Nothing is likely wrong if the head is no better than always giving the most frequent label.
    """
    labels, rows = shares.shape[1], np.arange(len(true))
    usual = np.array(
        [
            shares[true == label, label].mean() if judged[label] else np.inf
            for label in range(labels)
        ]
    )
    confidence = shares[rows, true]
    others = shares.copy()
    others[rows, true] = -1.0
    suggested = others.argmax(axis=1)
    other = others[rows, suggested]
    sure = np.where(shares >= usual, shares, -1.0)
    knows = (shares.argmax(axis=1) == true).mean() > np.bincount(true).max() / len(true)
    likely = knows & (sure.max(axis=1) > 0) & (sure.argmax(axis=1) != true)
    return [
        Suspect(
            int(row),
            (int(suggested[row]),),
            float(confidence[row]),
            float(other[row]),
            bool(likely[row]),
        )
        if judged[true[row]]
        else Suspect(int(row), (int(true[row]),), 1.0, 0.0, likely=False)
        for row in rows
    ]


def _of_sets(shares: _Array, given: _Array, judged: _Array) -> list[Suspect]:
    """Likely wrong: a decision about a label whose score is usual for texts decided otherwise.

    Labels that the head cannot predict better than by their frequency are left out.
    """
    usual_with = np.ones(len(judged))
    usual_without = np.zeros(len(judged))
    for label in np.flatnonzero(judged):
        has = given[:, label]
        usual_with[label] = shares[has, label].mean()
        usual_without[label] = shares[~has, label].mean() if not has.all() else 0.0
    own = np.where(given, shares, 1 - shares)
    own[:, ~judged] = 1.0
    share_with = given.mean(axis=0)
    knows = ((shares >= 0.5) == given).mean(axis=0) > np.maximum(share_with, 1 - share_with)
    wrong = np.where(given, shares <= usual_without, shares >= usual_with) & judged & knows
    answers = np.where(judged, shares >= 0.5, given)
    worst = own.min(axis=1)
    return [
        Suspect(
            row,
            tuple(np.flatnonzero(answers[row]).tolist()),
            float(worst[row]),
            float(1 - worst[row]),
            bool(wrong[row].any()),
        )
        for row in range(len(given))
    ]
