"""`fit --search`: a bounded number of trials of other settings, compared on the validation rows.

    the defaults, then what is proposed -> trials, the hopeless ended early -> the best one's state

Two files lie beside the output while a search goes on: what is known of its trials, and the final
state of the best one, so that nothing is trained twice. Knows no model and no data.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.config.settings import FitSettings, entries
from train.errors import SettingsError
from train.report.report import TrialOutcome

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from adapters.format.durable import write_atomically
from train.errors import ResumeError, TrainingError
from train.fit.training import Training
from train.loop.checkpoint import state_path
from train.loop.progress import EpochReport, Progress
from train.report.report import TrialReport

if TYPE_CHECKING:
    from optuna.trial import Trial


# --- merged from train.proposals

# Trials before the proposals learn from them, the defaults among them; the others are at random.
FIRST_TRIALS = 5
# Trials that were trained to their end before another one is ended early.
WHOLE_TRIALS = 3
# And epochs before it may be, or a third of all if that is more: a late start is no bad end.
LEAST_EPOCHS = 2

# The paper's grid; of weight decays more, because soft prompts bear more.
LEARNING_RATES = (1e-5, 5e-3)
WEIGHT_DECAYS = (1e-3, 10.0)
MOST_DROPOUT = 0.3
BATCH_SIZES = (16, 32, 64)


class Proposals:
    """Trials in their order. Which settings a trial gets is a function of the seed, its number and
    what came of those before it, so that an interrupted search goes on as it would have gone on.

    Args:
        defaults: what a run without a search takes: the first trial.
        layers: of the backbone.
        epochs: of a trial.

    Raises:
        SettingsError: nothing is left open, or optuna is not installed.
    """

    def __init__(
        self, settings: FitSettings, defaults: Mapping[str, Any], *, layers: int, epochs: int
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise SettingsError(["--search needs a package: pip install optuna"]) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        everything = _space(defaults, layers)
        self.space = {name: some for name, some in everything.items() if settings.is_open(name)}
        if not self.space:
            flags = [entry.flag for entry in entries() if entry.name in everything]
            raise SettingsError([f"--search has nothing to choose: {', '.join(flags)} are given"])
        self._seed = settings.seed
        self._study = optuna.create_study(
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=WHOLE_TRIALS, n_warmup_steps=max(LEAST_EPOCHS, epochs // 3)
            ),
        )
        self._first = {name: defaults[name] for name in self.space}

    def add(
        self, settings: Mapping[str, Any], outcome: TrialOutcome, accuracies: Sequence[float]
    ) -> None:
        """What an earlier start of this search has found out.

        Args:
            accuracies: of the validation rows, after every epoch.
        """
        self._study.add_trial(self._frozen(settings, outcome, accuracies))

    def next(self) -> "Trial":
        """A trial; `params` are its settings. It wants to be told every epoch's accuracy, and to be
        passed to `end`."""
        import optuna

        number = len(self._study.trials)
        if number == 0:
            self._study.enqueue_trial(self._first)
        self._study.sampler = optuna.samplers.TPESampler(
            seed=hash((self._seed, number)) & 0x7FFF_FFFF, n_startup_trials=FIRST_TRIALS
        )
        return self._study.ask(self.space)

    def again(self, settings: Mapping[str, Any]) -> "Trial":
        """The trial that was under way when the search was interrupted."""
        self._study.enqueue_trial(dict(settings))
        return self._study.ask(self.space)

    def end(self, trial: "Trial", outcome: TrialOutcome, accuracies: Sequence[float]) -> None:
        """A trial is over."""
        value = max(accuracies) if outcome is TrialOutcome.FINISHED else None
        self._study.tell(trial, value, state=_states()[outcome])

    def _frozen(
        self, settings: Mapping[str, Any], outcome: TrialOutcome, accuracies: Sequence[float]
    ) -> "FrozenTrial":
        import optuna

        return optuna.trial.create_trial(
            params=dict(settings),
            distributions=self.space,
            value=max(accuracies) if outcome is TrialOutcome.FINISHED else None,
            intermediate_values=dict(enumerate(accuracies, start=1)),
            state=_states()[outcome],
        )


def _space(defaults: Mapping[str, Any], layers: int) -> "dict[str, BaseDistribution]":
    """Wide enough for the defaults, whatever they are."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    rate, decay = defaults["learning_rate"], defaults["weight_decay"]
    return {
        "learning_rate": FloatDistribution(
            min(LEARNING_RATES[0], rate), max(LEARNING_RATES[1], rate), log=True
        ),
        # No logarithm reaches zero.
        "weight_decay": FloatDistribution(
            min(WEIGHT_DECAYS[0], decay), max(WEIGHT_DECAYS[1], decay), log=decay > 0
        ),
        "dropout": FloatDistribution(0.0, max(MOST_DROPOUT, defaults["dropout"])),
        "insertion_layer": IntDistribution(0, layers - 1),
        "batch_size": CategoricalDistribution(sorted({*BATCH_SIZES, defaults["batch_size"]})),
    }


def _states() -> Mapping[TrialOutcome, Any]:
    from optuna.trial import TrialState

    return {
        TrialOutcome.FINISHED: TrialState.COMPLETE,
        TrialOutcome.PRUNED: TrialState.PRUNED,
        TrialOutcome.FAILED: TrialState.FAIL,
    }


# --- merged from train.search

Begin: TypeAlias = Callable[[FitSettings, Progress], Training]


def search_path(output: Path) -> Path:
    """Where the trials of the search that writes `output` are kept."""
    return output.with_name(output.name + ".search")


def remove_search(output: Path) -> None:
    """Once the adapter is written."""
    search_path(output).unlink(missing_ok=True)
    _best_path(output).unlink(missing_ok=True)


def search(
    begin: Begin,
    settings: FitSettings,
    proposals: Proposals,
    *,
    output: Path,
    run: str,
    progress: Progress,
) -> tuple[FitSettings, tuple[TrialReport, ...]]:
    """Run the trials.

    Args:
        begin: sets a run up; its state lies beside `output`.
        run: identifies data, settings and backbone; another search's trials are refused.

    Returns:
        settings of the best trial, which resume its final state, and what came of every trial.

    Raises:
        TrainingError: no trial ended with a finite loss; or as `begin`.
        ResumeError: nothing to resume, or the trials of another search.
    """
    assert settings.search is not None
    found = _Search(begin, settings, proposals, output, run, progress)
    if settings.resume:
        found.load()
    else:
        remove_search(output)
        # Not to be taken for that of the first trial.
        state_path(output).unlink(missing_ok=True)
    while not found.is_complete:
        found.run_trial()
    return found.best()


@dataclass(slots=True)
class _Record:
    """What is kept of a trial. outcome: None while it is under way. score: of its best epoch, to
    compare by: accuracy, then the negative loss."""

    settings: dict[str, Any]
    outcome: TrialOutcome | None = None
    accuracies: list[float] = field(default_factory=list)
    score: tuple[float, float] | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, content: dict[str, Any]) -> "_Record":
        if content["outcome"] is not None:
            content["outcome"] = TrialOutcome(content["outcome"])
        if content["score"] is not None:
            content["score"] = tuple(content["score"])
        return cls(**content)

    def report(self, number: int, *, chosen: bool) -> TrialReport:
        assert self.outcome is not None
        return TrialReport(
            number=number,
            settings=self.settings,
            outcome=self.outcome,
            accuracy=max(self.accuracies, default=None),
            epochs=len(self.accuracies),
            seconds=self.seconds,
            chosen=chosen,
        )


class _Hopeless(Exception):
    """A trial is worse than the median of those before it."""


class _TrialProgress(Progress):
    """Shows a trial's stages under its name, and ends it where it is hopeless."""

    def __init__(self, progress: Progress, trial: "Trial", *, title: str, best: str) -> None:
        self._progress = progress
        self._trial = trial
        self._title, self._best = title, best

    def note(self, message: str) -> None:
        self._progress.note(message)

    def advance(
        self, texts: int, *, loss: float | None = None, accuracy: float | None = None
    ) -> None:
        self._progress.advance(texts, loss=loss, accuracy=accuracy)

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:
        name = f"{self._title}, {stage}{self._best}"
        self._progress.begin(name, texts=texts, later=later)

    def epoch_done(self, report: EpochReport) -> None:
        assert report.accuracy is not None, "a search has validation rows"
        self._trial.report(report.accuracy, report.epoch)
        if self._trial.should_prune():
            raise _Hopeless


class _Search:
    def __init__(
        self,
        begin: Begin,
        settings: FitSettings,
        proposals: Proposals,
        output: Path,
        run: str,
        progress: Progress,
    ) -> None:
        self._begin = begin
        self._settings = settings
        self._proposals = proposals
        self._output = output
        self._run = run
        self._progress = progress
        self._records: list[_Record] = []

    @property
    def is_complete(self) -> bool:
        under_way = bool(self._records) and self._records[-1].outcome is None
        return len(self._records) >= (self._settings.search or 0) and not under_way

    def load(self) -> None:
        """What an interrupted search has found out."""
        path = search_path(self._output)
        if not path.exists():
            raise ResumeError(f"{path}: there is no interrupted search to resume")
        try:
            content = json.loads(path.read_bytes())
            self._records = [_Record.of(trial) for trial in content["trials"]]
            run = content["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path}: cannot be read ({error})") from None
        if run != self._run:
            raise ResumeError(
                f"{path}: belongs to a search with other data, settings or backbone; "
                "remove it to start over"
            )
        for record in self._records:
            if record.outcome is not None:
                self._proposals.add(record.settings, record.outcome, record.accuracies)

    def run_trial(self) -> None:
        """The next one, or the one that was under way."""
        resume = False
        if self._records and self._records[-1].outcome is None:
            trial = self._proposals.again(self._records[-1].settings)
            resume = state_path(self._output).exists()
        else:
            trial = self._proposals.next()
            self._records.append(_Record(trial.params))
            self._save()
        record = self._records[-1]
        title = f"trial {len(self._records)}/{self._settings.search}"
        shown = _TrialProgress(self._progress, trial, title=title, best=self._best_so_far())
        training = self._begin(
            replace(self._settings, **record.settings, resume=resume, search=None), shown
        )
        state = training.loop.state
        try:
            # What it was told before an interruption.
            for report in state.history:
                shown.epoch_done(report)
            training.loop.fit(shown)
            record.outcome = TrialOutcome.FINISHED
        except _Hopeless:
            record.outcome = TrialOutcome.PRUNED
        except TrainingError:
            record.outcome = TrialOutcome.FAILED
        record.accuracies = [epoch.accuracy or 0.0 for epoch in state.history]
        record.seconds = state.seconds
        record.score = state.best_score
        self._keep(training)
        self._proposals.end(trial, record.outcome, record.accuracies)
        self._save()
        self._progress.note(self._line())

    def best(self) -> tuple[FitSettings, tuple[TrialReport, ...]]:
        """The best trial's settings, its state in place of the run's."""
        best = self._best
        if best is None:
            raise TrainingError(
                f"none of the {len(self._records)} trials of the search ended with a finite loss"
            )
        if _best_path(self._output).exists():
            os.replace(_best_path(self._output), state_path(self._output))
        record = self._records[best]
        settings = replace(
            self._settings, **record.settings, resume=state_path(self._output).exists()
        )
        return settings, tuple(
            record.report(number, chosen=number == best + 1)
            for number, record in enumerate(self._records, start=1)
        )

    @property
    def _best(self) -> int | None:
        """Its index; of equal ones the first."""
        finished = [
            index
            for index, record in enumerate(self._records)
            if record.outcome is TrialOutcome.FINISHED
        ]
        return max(finished, key=lambda index: self._records[index].score or (), default=None)

    def _keep(self, training: Training) -> None:
        """The state, if the trial that has just ended is the best; else it is removed."""
        if self._best == len(self._records) - 1:
            training.loop.save()
            os.replace(state_path(self._output), _best_path(self._output))
        state_path(self._output).unlink(missing_ok=True)

    def _save(self) -> None:
        content = {"run": self._run, "trials": [asdict(record) for record in self._records]}
        write_atomically(search_path(self._output), json.dumps(content).encode())

    def _best_so_far(self) -> str:
        best = self._best
        if best is None:
            return ""
        return f", best {max(self._records[best].accuracies):.4f} (trial {best + 1})"

    def _line(self) -> str:
        """`trial 3/20: 0.9123, best 0.9200 (trial 1): --lr 0.0012 --dropout 0.21`."""
        record = self._records[-1]
        reached = f"{max(record.accuracies):.4f}" if record.accuracies else "nothing"
        match record.outcome:
            case TrialOutcome.PRUNED:
                reached = f"ended early at {reached} after epoch {len(record.accuracies)}"
            case TrialOutcome.FAILED:
                reached = "its loss was not finite"
        flags = " ".join(_flags(record.settings))
        return (
            f"trial {len(self._records)}/{self._settings.search}: "
            f"{reached}{self._best_so_far()}: {flags}"
        )


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags = {entry.name: entry.flag for entry in entries()}
    return [
        f"{flags[name]} {value:.4g}" if isinstance(value, float) else f"{flags[name]} {value}"
        for name, value in settings.items()
    ]


def _best_path(output: Path) -> Path:
    """Where the final state of the best trial so far is kept."""
    return output.with_name(output.name + ".search.best")
