"""The temperature of the scores, kept only where it brings them nearer to the truth.

Guo et al., On Calibration of Modern Neural Networks, 2017, divide the logits by the temperature
that minimises the loss on validation rows. On few rows that fits their noise and can make scores
worse. Nothing shows it on the rows that chose the temperature, so it is judged by cross-fitting:
the rows are dealt into folds, and each fold's scores have the temperature that the other folds
choose.

Nothing here imports torch when it is loaded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.metrics import calibration_error

if TYPE_CHECKING:
    from torch import Tensor

    from train.objective import Objective

# From 1/8 to 8, a factor of two in twenty steps, 1 in the middle.
TEMPERATURES = tuple(2 ** (step / 20) for step in range(-60, 61))
FOLDS = 10
# With fewer rows the error of a fold's temperature says nothing.
LEAST_ROWS = 2 * FOLDS


@dataclass(frozen=True, slots=True)
class Calibrated:
    """How the temperature of an adapter's scores was chosen, on `rows` validation rows.

    temperature: 1 unless the fitted one is kept. fitted: what minimises the loss on all rows; None
    if there are too few. before, after: the expected calibration error, a share, at temperature 1
    and of what was chosen; after is never above before. cross_fitted: with the temperatures of the
    other folds, which is `after` if the temperature is kept; None if there are too few rows.
    """

    rows: int
    temperature: float
    fitted: float | None
    before: float
    cross_fitted: float | None
    after: float

    @property
    def kept(self) -> bool:
        """Whether the fitted temperature is that of the scores."""
        return self.temperature != 1.0


def calibrate(objective: "Objective", logits: "Tensor", true: "Tensor") -> Calibrated:
    """Choose the temperature on validation rows.

    It is kept if the expected calibration error falls, both cross-fitted and with the one
    temperature of all rows, and the cross-fitted loss falls as well. The calibration error is what
    people read, but it is a rough figure with bins. The loss is a proper score: it falls only if
    the scores get better. It counts one more mistake than there is (Platt, Probabilistic Outputs
    for Support Vector Machines, 1999, section 2.2), because rows without a mistake would otherwise
    ask for scores of 1.

    Args:
        logits: float [rows, labels] on the CPU, at least one row.
        true: as `Objective.loss` takes it.
    """
    import torch

    logits, before = logits.detach(), _error(objective, logits, true)
    if len(logits) < LEAST_ROWS:
        return Calibrated(len(logits), 1.0, None, before, None, before)
    fold_of = _folds(len(logits))
    # [temperatures, folds]: the other folds' loss is the sum of all without a fold's own.
    losses = torch.zeros(len(TEMPERATURES), FOLDS, dtype=torch.float64)
    for at, temperature in enumerate(TEMPERATURES):
        of_rows = objective.row_losses(logits / temperature, true)
        losses[at].index_add_(0, fold_of, of_rows.double())
    together = losses.sum(dim=1)
    fitted = TEMPERATURES[_best(together)]
    of_folds = [TEMPERATURES[_best(together - losses[:, fold])] for fold in range(FOLDS)]
    crossed = logits / torch.tensor(of_folds, dtype=torch.float64)[fold_of][:, None]
    after, doubt = _error(objective, crossed, true), 1 / (true.numel() + 2)
    loss_before, loss_after = (
        float(objective.row_losses(scaled, true, doubt=doubt).double().sum())
        for scaled in (logits.double(), crossed)
    )
    better = (
        after < before
        and _error(objective, logits / fitted, true) < before
        and loss_after < loss_before
    )
    if not better:
        return Calibrated(len(logits), 1.0, fitted, before, after, before)
    return Calibrated(len(logits), fitted, fitted, before, after, after)


def _folds(rows: int) -> "Tensor":
    """The fold of each row, int64 [rows]: of equal sizes, and always the same."""
    import torch

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    folds = torch.empty(rows, dtype=torch.int64)
    folds[order] = torch.arange(rows) % FOLDS
    return folds


def _best(losses: "Tensor") -> int:
    """The temperature of the lowest loss; of equal ones the nearest to 1."""
    middle, values = len(TEMPERATURES) // 2, losses.tolist()
    return min(range(len(values)), key=lambda at: (values[at], abs(at - middle)))


def _error(objective: "Objective", logits: "Tensor", true: "Tensor") -> float:
    scores, right = objective.promises(logits, true)
    return calibration_error(scores.numpy(), right.numpy())
