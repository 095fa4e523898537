"""What training announces while it runs. `train.report.progress` shows it."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch. loss: mean training loss. accuracy, macro_f1: of the validation rows, if any.

    micro_f1: where a text has a set of labels; accuracy is then the share of exact matches.
    seconds: of training and validation together. texts_per_second: of training alone.
    """

    epoch: int
    loss: float
    accuracy: float | None
    macro_f1: float | None
    seconds: float
    texts_per_second: float
    micro_f1: float | None = None

    @property
    def score(self) -> float | None:
        """What `fit` judges it by: `train.metrics.Metric.default`."""
        return self.accuracy if self.micro_f1 is None else self.micro_f1


class Progress:
    """Receives what training announces, from one thread. This base class shows nothing."""

    def note(self, message: str) -> None:
        """One line of news."""

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:
        """A stage of known length starts, and the one before it is over.

        Args:
            stage: `epoch 3/20`, `lower layers`, ...
            texts: how many texts this stage works through.
            later: texts of the later stages of this kind, from which the time left is estimated.
        """

    def advance(
        self, texts: int, *, loss: float | None = None, accuracy: float | None = None
    ) -> None:
        """A step of the stage is done. loss, accuracy: running means of this stage."""

    def epoch_done(self, report: EpochReport) -> None:
        """An epoch and its validation are over."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to close."""
