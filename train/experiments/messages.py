"""What a worker tells while it runs a cell. How the cell ended is an `Outcome`."""

from dataclasses import dataclass
from typing import TypeAlias

from train.experiments.store import Outcome
from train.report import EpochReport


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker listens: what is sent to it is read at once."""


@dataclass(frozen=True, slots=True)
class Noted:
    """One line of news."""

    text: str


@dataclass(frozen=True, slots=True)
class Moved:
    """Where the run stands: `epoch 3/20`, and how much of that is done, from 0 to 1."""

    stage: str
    share: float


@dataclass(frozen=True, slots=True)
class EpochEnded:
    """An epoch and its measurement on the selection rows are over."""

    report: EpochReport


News: TypeAlias = Noted | Moved | EpochEnded
Message: TypeAlias = Ready | News | Outcome
