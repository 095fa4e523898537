"""What is asked of the logits: one label for a text, or a set of labels.

Loss, predictions and figures of both, and what the head starts from. Everything else of a training
is the same for both.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from train.metrics import AnyMetrics, Metric, Metrics, MultiLabelMetrics, measure
from train.set_metrics import measure_sets, reached

Activation: TypeAlias = Literal["softmax", "sigmoid"]


class Objective(ABC):
    """One of the two. `true` is what `train.loop.encoded_splits.classes_of` gives."""

    metric: Metric

    @abstractmethod
    def loss(self, logits: Tensor, true: Tensor) -> Tensor:
        """The negative log-likelihood of the rows, summed over them, in nats: a scalar.

        Args:
            logits: float [rows, labels].
        """

    @abstractmethod
    def row_losses(self, logits: Tensor, true: Tensor, *, doubt: float = 0.0) -> Tensor:
        """The summands of `loss`, float [rows].

        Args:
            doubt: the share of its probability that a row's truth gives to all labels alike.
        """

    @abstractmethod
    def predict(
        self, logits: Tensor, *, thresholds: Sequence[float] | None = None, temperature: float = 1.0
    ) -> Tensor:
        """The answers: int64 [rows], or bool [rows, labels].

        Args:
            logits: float [rows, labels], before the temperature.
            thresholds: of sets of labels; None: a half each.
        """

    @abstractmethod
    def promises(self, logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        """The scores whose calibration counts, and whether each came true.

        float64 and bool: [rows], of the best labels, or [rows, labels], of all decisions.
        """

    @abstractmethod
    def row_hits(self, logits: Tensor, true: Tensor) -> Tensor:
        """Whether each row is answered correctly in full: bool [rows]."""

    def hits(self, logits: Tensor, true: Tensor) -> Tensor:
        """How many rows are: an integer scalar."""
        return self.row_hits(logits, true).sum()

    @abstractmethod
    def measure(self, predicted: Tensor, true: Tensor, *, labels: int) -> AnyMetrics:
        """The figures of answers as `predict` gives them."""

    @abstractmethod
    def start(self, bias: Tensor, true: Tensor) -> None:
        """Set the initial bias of a head, [labels], in place, from the training rows' labels."""


class OneLabel(Objective):
    """Cross-entropy over a softmax; the best label is the answer."""

    metric = Metric.ACCURACY

    def loss(self, logits: Tensor, true: Tensor) -> Tensor:
        return functional.cross_entropy(logits, true, reduction="sum")

    def row_losses(self, logits: Tensor, true: Tensor, *, doubt: float = 0.0) -> Tensor:
        return functional.cross_entropy(logits, true, reduction="none", label_smoothing=doubt)

    def predict(
        self,
        logits: Tensor,
        *,
        thresholds: Sequence[float] | None = None,  # noqa: ARG002  # inherited
        temperature: float = 1.0,  # noqa: ARG002  # inherited
    ) -> Tensor:
        return logits.argmax(dim=-1)

    def promises(self, logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        best = logits.double().softmax(dim=-1).max(dim=-1)
        return best.values, best.indices == true

    def row_hits(self, logits: Tensor, true: Tensor) -> Tensor:
        return logits.argmax(dim=-1) == true

    def measure(self, predicted: Tensor, true: Tensor, *, labels: int) -> Metrics:
        return measure(predicted, true, labels=labels)

    def start(self, bias: Tensor, true: Tensor) -> None:
        """Leaves it at zero: the first prediction is uniform."""


class LabelSets(Objective):
    """Binary cross-entropy over a sigmoid; the labels that reach their thresholds are the answer.

    Most texts lack most labels. A head that starts at one half for every label spends its first
    epochs on learning that alone, so it starts from each label's frequency.
    """

    metric = Metric.MICRO_F1

    def loss(self, logits: Tensor, true: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, true, reduction="sum")

    def row_losses(self, logits: Tensor, true: Tensor, *, doubt: float = 0.0) -> Tensor:
        smooth = (true * (1 - doubt) + doubt / 2).to(logits.dtype)
        losses = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        return losses.sum(dim=1)

    def predict(
        self, logits: Tensor, *, thresholds: Sequence[float] | None = None, temperature: float = 1.0
    ) -> Tensor:
        return reached(logits, thresholds or (0.5,) * logits.shape[1], temperature)

    def promises(self, logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        return logits.double().sigmoid(), true > 0

    def row_hits(self, logits: Tensor, true: Tensor) -> Tensor:
        return ((logits >= 0) == (true > 0)).all(dim=-1)

    def measure(self, predicted: Tensor, true: Tensor, *, labels: int) -> MultiLabelMetrics:  # noqa: ARG002
        return measure_sets(predicted, true > 0)

    def start(self, bias: Tensor, true: Tensor) -> None:
        # Half a text is added on both sides, so that a label that all or no texts have is finite.
        having = true.sum(dim=0) + 0.5
        with torch.no_grad():
            bias.copy_((having / (len(true) + 1 - having)).log())


OBJECTIVES: Mapping[Activation, Objective] = {"softmax": OneLabel(), "sigmoid": LabelSets()}
