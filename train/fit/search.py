"""`fit --search`: a bounded number of trials of other settings, compared on the validation rows.

The first trial has the defaults, optuna proposes the others, and trials that fall behind end early.

During a search two files are beside the output: the records of its trials, and the final checkpoint
of the best trial, so that nothing is trained twice.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from adapters.format.durable import write_atomically
from cli.hints import command_line
from train.config.settings import FitSettings, entries
from train.errors import ResumeError, SettingsError, TrainingError
from train.fit.best import Candidate, Candidates, is_better
from train.loop.checkpoint import checkpoint_path
from train.loop.identity import Identity, decode_identity, differences, refusal
from train.loop.loop import Loop, RowCounts
from train.loop.progress import EpochReport, Progress
from train.report.report import TrialOutcome, TrialReport

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

# Trials before the proposals learn from them: the defaults, then random settings.
FIRST_TRIALS = 5
# Trials that are trained to the end before another one may be ended early.
WHOLE_TRIALS = 3
# Epochs before a trial may be ended early, or a third of all if that is more: some start slowly.
LEAST_EPOCHS = 2

# The paper's grid, with higher weight decays: soft prompts tolerate more.
LEARNING_RATES = (1e-5, 5e-3)
WEIGHT_DECAYS = (1e-3, 10.0)
MOST_DROPOUT = 0.3
BATCH_SIZES = (16, 32, 64)

# Sets up a run, whose checkpoint is beside the output.
SetUp: TypeAlias = Callable[[FitSettings, Progress], Loop]


def search_path(output: Path) -> Path:
    """The records of the trials of the search that writes `output`."""
    return output.with_name(output.name + ".search")


def saved_search(output: Path) -> Identity:
    """The identity of the search whose records are there; empty if the file cannot tell."""
    try:
        return decode_identity(str(json.loads(search_path(output).read_bytes())["run"]))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _best_checkpoint_path(output: Path) -> Path:
    """The final checkpoint of the best trial so far."""
    return output.with_name(output.name + ".search.best")


def remove_search(output: Path) -> None:
    """Delete the files of a search."""
    search_path(output).unlink(missing_ok=True)
    _best_checkpoint_path(output).unlink(missing_ok=True)


class Proposals:
    """Which settings each trial gets.

    They are a function of the seed, the trial's number and the results of the trials before it, so
    that an interrupted search continues as it would have without the interruption.

    Args:
        defaults: the settings of a run without a search that its method has; the first trial has
            them.
        layers: of the backbone.
        epochs: of a trial.

    Raises:
        SettingsError: no setting is left open, or optuna is not installed.
    """

    def __init__(
        self, settings: FitSettings, defaults: Mapping[str, Any], *, layers: int, epochs: int
    ) -> None:
        try:
            import optuna
        except ImportError:
            install = command_line("pip", "install", "optuna")
            raise SettingsError([f"--search needs a package: {install}"]) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        whole_space = _space(defaults, layers)
        self.space = {
            name: values for name, values in whole_space.items() if settings.is_open(name)
        }
        if not self.space:
            flags = [entry.flag for entry in entries() if entry.name in whole_space]
            raise SettingsError([f"--search has nothing to choose: you set {', '.join(flags)}"])
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
        """Learn from a trial that ended before this search was interrupted.

        Args:
            accuracies: on the validation rows, after every epoch; micro-F1 for sets of labels.
        """
        import optuna

        self._study.add_trial(
            optuna.trial.create_trial(
                params=dict(settings),
                distributions=self.space,
                value=_value(outcome, accuracies),
                intermediate_values=dict(enumerate(accuracies, start=1)),
                state=_optuna_state(outcome),
            )
        )

    def next(self) -> "Trial":
        """A new trial; `params` are its settings. Report every epoch's score, then `end` it."""
        import optuna

        number = len(self._study.trials)
        if number == 0:
            self._study.enqueue_trial(self._first)
        self._study.sampler = optuna.samplers.TPESampler(
            seed=hash((self._seed, number)) & 0x7FFF_FFFF, n_startup_trials=FIRST_TRIALS
        )
        return self._study.ask(self.space)

    def again(self, settings: Mapping[str, Any]) -> "Trial":
        """Start again the trial during which the search was interrupted."""
        self._study.enqueue_trial(dict(settings))
        return self._study.ask(self.space)

    def end(self, trial: Any, outcome: TrialOutcome, accuracies: Sequence[float]) -> None:
        """Learn from a trial that has ended."""
        self._study.tell(trial, _value(outcome, accuracies), state=_optuna_state(outcome))


def _space(defaults: Mapping[str, Any], layers: int) -> "dict[str, BaseDistribution]":
    """Every setting that a search may choose. All ranges include the defaults."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    rate, decay = defaults["learning_rate"], defaults["weight_decay"]
    space: dict[str, BaseDistribution] = {
        # Vectors and head keep their proportion to it.
        "learning_rate": FloatDistribution(
            min(LEARNING_RATES[0], rate), max(LEARNING_RATES[1], rate), log=True
        ),
        # A logarithmic range cannot include zero.
        "weight_decay": FloatDistribution(
            min(WEIGHT_DECAYS[0], decay), max(WEIGHT_DECAYS[1], decay), log=decay > 0
        ),
        "dropout": FloatDistribution(0.0, max(MOST_DROPOUT, defaults["dropout"])),
    }
    if "insertion_layer" in defaults:
        space["insertion_layer"] = IntDistribution(0, layers - 1)
    sizes = sorted({*BATCH_SIZES, defaults["batch_size"]})
    return space | {"batch_size": CategoricalDistribution(sizes)}


def _value(outcome: TrialOutcome, accuracies: Sequence[float]) -> float | None:
    return max(accuracies) if outcome is TrialOutcome.FINISHED else None


def _optuna_state(outcome: TrialOutcome) -> Any:
    from optuna.trial import TrialState

    return {
        TrialOutcome.FINISHED: TrialState.COMPLETE,
        TrialOutcome.PRUNED: TrialState.PRUNED,
        TrialOutcome.FAILED: TrialState.FAIL,
    }[outcome]


def search(
    set_up: SetUp,
    settings: FitSettings,
    proposals: Proposals | Candidates,
    *,
    output: Path,
    run: str,
    progress: Progress,
) -> tuple[FitSettings, tuple[TrialReport, ...]]:
    """Run the trials.

    Args:
        run: its encoded identity; records of another search are refused.

    Returns:
        the best trial's settings, which resume its final checkpoint, and a report on every trial.

    Raises:
        TrainingError: no trial ended with a finite loss; or whatever `set_up` raises.
        ResumeError: there is no search to resume, or it is another one.
    """
    assert settings.search is not None
    trials = _Search(set_up, settings, proposals, output, run, progress)
    if settings.resume:
        trials.load()
    else:
        remove_search(output)
        # The first trial must not resume the checkpoint of another run.
        checkpoint_path(output).unlink(missing_ok=True)
    while not trials.is_complete:
        trials.run_trial()
    return trials.best_settings()


@dataclass(slots=True)
class _Record:
    """A trial as the file keeps it. outcome: None while it is running.

    accuracies: after every epoch; micro-F1 for sets of labels. score: of its best epoch: the same,
    then the negative loss. Trials are compared by it. counts: of methods, which are compared row by
    row.
    """

    settings: dict[str, Any]
    outcome: TrialOutcome | None = None
    accuracies: list[float] = field(default_factory=list)
    score: tuple[float, float] | None = None
    seconds: float = 0.0
    counts: RowCounts | None = None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        if content["outcome"] is not None:
            content["outcome"] = TrialOutcome(content["outcome"])
        if content["score"] is not None:
            content["score"] = tuple(content["score"])
        if content.get("counts") is not None:
            content["counts"] = RowCounts(**content["counts"])
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


class _Pruned(Exception):
    """A trial is worse than the median of those before it."""


class _TrialProgress(Progress):
    """Shows a trial's stages under its title, reports its epochs to optuna, and may prune it."""

    def __init__(
        self, progress: Progress, trial: "Trial | Candidate", *, title: str, best: str
    ) -> None:
        self._progress = progress
        self._trial = trial
        self._title, self._best = title, best

    def note(self, message: str) -> None:
        self._progress.note(message)

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:
        name = f"{self._title}, {stage}{self._best}"
        self._progress.begin(name, texts=texts, later=later)

    def advance(
        self, texts: int, *, loss: float | None = None, accuracy: float | None = None
    ) -> None:
        self._progress.advance(texts, loss=loss, accuracy=accuracy)

    def epoch_done(self, report: EpochReport) -> None:
        assert report.score is not None, "a search has validation rows"
        self._trial.report(report.score, report.epoch)
        if self._trial.should_prune():
            raise _Pruned


class _Search:
    def __init__(
        self,
        set_up: SetUp,
        settings: FitSettings,
        proposals: Proposals | Candidates,
        output: Path,
        run: str,
        progress: Progress,
    ) -> None:
        self._set_up = set_up
        self._settings = settings
        self._proposals = proposals
        self._output = output
        self._checkpoint = checkpoint_path(output)
        self._run = run
        self._progress = progress
        self._records: list[_Record] = []

    @property
    def is_complete(self) -> bool:
        return len(self._records) >= (self._settings.search or 0) and not self._was_cut_short

    @property
    def _was_cut_short(self) -> bool:
        return bool(self._records) and self._records[-1].outcome is None

    def load(self) -> None:
        """Read the records of an interrupted search."""
        path = search_path(self._output)
        if not path.exists():
            raise ResumeError(f"{path}: there is no interrupted search to resume")
        try:
            content = json.loads(path.read_bytes())
            self._records = [_Record.from_json(record) for record in content["trials"]]
            run = content["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path}: cannot be read ({error})") from None
        if run != self._run:
            found = differences(decode_identity(str(run)), decode_identity(self._run))
            raise ResumeError(refusal(path, "search", found))
        for record in self._records:
            if record.outcome is not None:
                self._proposals.add(record.settings, record.outcome, record.accuracies)

    def run_trial(self) -> None:
        """Run the next trial, or finish the one that was cut short."""
        resume = False
        if self._was_cut_short:
            trial = self._proposals.again(self._records[-1].settings)
            resume = self._checkpoint.exists()
        else:
            trial = self._proposals.next()
            self._records.append(_Record(trial.params))
            self._save()
        record = self._records[-1]
        shown = _TrialProgress(self._progress, trial, title=self._title, best=self._describe_best())
        loop = self._set_up(
            replace(self._settings, **record.settings, resume=resume, search=None), shown
        )
        checkpoint = loop.checkpoint
        try:
            # The epochs that were reported before an interruption.
            for report in checkpoint.history:
                shown.epoch_done(report)
            loop.fit(shown)
            record.outcome = TrialOutcome.FINISHED
            if isinstance(self._proposals, Candidates):
                record.counts = loop.validation_counts()
        except _Pruned:
            record.outcome = TrialOutcome.PRUNED
        except TrainingError:
            record.outcome = TrialOutcome.FAILED
        record.accuracies = [epoch.score or 0.0 for epoch in checkpoint.history]
        record.seconds = checkpoint.seconds
        record.score = checkpoint.best_score
        if self._best == len(self._records) - 1:
            loop.save()
            os.replace(self._checkpoint, _best_checkpoint_path(self._output))
        self._checkpoint.unlink(missing_ok=True)
        self._proposals.end(trial, record.outcome, record.accuracies)
        self._save()
        self._progress.note(self._describe_last())

    def best_settings(self) -> tuple[FitSettings, tuple[TrialReport, ...]]:
        """The best trial's settings, with its checkpoint in place of the run's, and all reports."""
        best = self._best
        if best is None:
            raise TrainingError(
                f"none of the {len(self._records)} trials of the search ended with a finite loss"
            )
        if _best_checkpoint_path(self._output).exists():
            os.replace(_best_checkpoint_path(self._output), self._checkpoint)
        settings = replace(
            self._settings, **self._records[best].settings, resume=self._checkpoint.exists()
        )
        return settings, tuple(
            record.report(number, chosen=number == best + 1)
            for number, record in enumerate(self._records, start=1)
        )

    @property
    def _best(self) -> int | None:
        """The index of the best finished trial, the first of equal ones."""
        best: int | None = None
        for index, record in enumerate(self._records):
            if record.outcome is not TrialOutcome.FINISHED or record.score is None:
                continue
            if best is None or _replaces(record, self._records[best]):
                best = index
        return best

    def _save(self) -> None:
        content = {"run": self._run, "trials": [asdict(record) for record in self._records]}
        write_atomically(search_path(self._output), json.dumps(content).encode())

    @property
    def _title(self) -> str:
        return f"trial {len(self._records)}/{self._settings.search}"

    def _describe_best(self) -> str:
        best = self._best
        if best is None:
            return ""
        return f", best {max(self._records[best].accuracies):.4f} (trial {best + 1})"

    def _describe_last(self) -> str:
        """`trial 3/20: 0.9123, best 0.9200 (trial 1): --lr 0.0012 --dropout 0.21`."""
        record = self._records[-1]
        result = f"{max(record.accuracies):.4f}" if record.accuracies else "nothing"
        match record.outcome:
            case TrialOutcome.PRUNED:
                result = f"ended early at {result} after epoch {len(record.accuracies)}"
            case TrialOutcome.FAILED:
                result = "its loss was not finite"
        flags = " ".join(_flags(record.settings))
        return f"{self._title}: {result}{self._describe_best()}: {flags}"


def _replaces(record: _Record, kept: _Record) -> bool:
    """Whether a trial is better than the best one before it; a method must be so beyond chance."""
    if record.counts is not None and kept.counts is not None:
        return is_better(record.counts, kept.counts)
    return (record.score or (0.0, 0.0)) > (kept.score or (0.0, 0.0))


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags = {entry.name: entry.flag for entry in entries()}
    return [
        f"{flags[name]} {value:.4g}" if isinstance(value, float) else f"{flags[name]} {value}"
        for name, value in settings.items()
    ]
