"""What a search tries next, and when a trial is hopeless: the part that is optuna's.

The paper's grid, continuous where a number has a scale. Knows no training and no file.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.errors import SettingsError
from train.report import TrialOutcome
from train.settings import FitSettings, entries

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

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
