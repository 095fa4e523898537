"""`fit --search`: never below the defaults, bounded, and resumable at any moment."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.format.files import load_adapter
from tests.support import families
from tests.support.training import (
    TRAIN,
    Interrupt,
    RecordingProgress,
    files_of,
    fitted,
    is_same,
    settings_of,
)
from train.config.settings import FitSettings, MethodName, StorageType
from train.errors import ResumeError, SettingsError, TrainingError
from train.fit.fit import fit
from train.fit.search import FIRST_TRIALS, LEAST_EPOCHS, WHOLE_TRIALS, Proposals, search_path
from train.loop.checkpoint import checkpoint_path
from train.loop.progress import Progress
from train.metrics import Metrics
from train.report.card_file import card_path
from train.report.report import FitReport, TrialOutcome, TrialReport

TRIALS = 4
DEFAULTS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "dropout": 0.1,
    "insertion_layer": 2,
    "batch_size": 32,
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    families.save("bert", folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[FitReport, Path]:
    """A search from its first trial to its last."""
    output = tmp_path_factory.mktemp("whole") / "a.safetensors"
    report, _ = fitted(_settings(backbone), output)
    return report, output


def _settings(backbone: str, **values: object) -> FitSettings:
    """`settings_of` sets the learning rate and we the batch size; the rest is searched."""
    fixed = {"search": TRIALS, "storage_dtype": StorageType.FLOAT32, "batch_size": 16} | values
    return settings_of(backbone, **fixed)


def _timeless(trials: tuple[TrialReport, ...]) -> list[TrialReport]:
    return [replace(trial, seconds=0.0) for trial in trials]


@pytest.mark.slow
def test_the_first_trial_is_the_run_without_a_search_and_the_best_is_kept(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Path]
) -> None:
    report, output = whole
    plain, _ = fitted(_settings(backbone, search=None), tmp_path / "a.safetensors")
    assert isinstance(plain.validation, Metrics)
    assert isinstance(report.validation, Metrics)
    first, chosen = report.trials[0], next(trial for trial in report.trials if trial.chosen)
    assert len(report.trials) == TRIALS
    assert [trial.number for trial in report.trials] == [1, 2, 3, 4]
    assert first.accuracy == plain.validation.accuracy
    assert {name: plain.settings[name] for name in first.settings} == first.settings
    assert report.validation.accuracy == chosen.accuracy
    assert chosen.accuracy == max(
        trial.accuracy or 0.0 for trial in report.trials if trial.outcome is TrialOutcome.FINISHED
    )
    assert {name: report.settings[name] for name in chosen.settings} == chosen.settings
    assert len(report.epochs) == chosen.epochs
    assert report.test is not None
    assert sorted(output.parent.iterdir()) == files_of(output)


@pytest.mark.slow
def test_the_adapter_is_that_of_a_run_with_the_chosen_settings(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Path]
) -> None:
    report, output = whole
    chosen = next(trial for trial in report.trials if trial.chosen)
    settings = replace(_settings(backbone, search=None), **chosen.settings)
    again, adapter = fitted(settings, tmp_path / "a.safetensors")
    assert again.test == report.test
    assert is_same(adapter, load_adapter(output))


@pytest.mark.slow
def test_report_and_card_list_the_trials(whole: tuple[FitReport, Path]) -> None:
    report, output = whole
    card = card_path(output).read_text()
    trials = json.loads(report.to_json())["trials"]
    assert [trial["number"] for trial in trials] == [1, 2, 3, 4]
    assert "### The search that chose these settings" in card
    for trial in trials:
        assert set(trial["settings"]) == {"dropout", "weight_decay", "insertion_layer"}
        mark = "kept" if trial["chosen"] else f"`{trial['outcome']}`"
        line = next(line for line in card.splitlines() if line.startswith(f"| {trial['number']} |"))
        assert f"| {trial['accuracy']:.4f} | {trial['epochs']} | {mark} |" in card, line


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 24, 25, 60])
def test_an_interrupted_search_continues_as_if_nothing_had_happened(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Path], steps: int
) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(_settings(backbone), output, Interrupt(steps))
    assert search_path(output).exists()
    assert not output.exists()
    with pytest.raises(KeyboardInterrupt):
        fitted(_settings(backbone, resume=True), output, Interrupt(10))
    report, adapter = fitted(_settings(backbone, resume=True), output)
    assert _timeless(report.trials) == _timeless(whole[0].trials)
    assert is_same(adapter, load_adapter(whole[1]))
    assert report.settings["resume"] is True
    assert sorted(output.parent.iterdir()) == files_of(output)


class _InterruptedEnd(Progress):
    """Ctrl-C when all training is done."""

    def note(self, message: str) -> None:
        if message == "training the head-only control":
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_search_interrupted_after_its_last_trial_trains_nothing_again(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Path]
) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(_settings(backbone), output, _InterruptedEnd())
    recorded = RecordingProgress()
    report, adapter = fitted(_settings(backbone, resume=True), output, recorded)
    assert not [stage for stage in recorded.stages if "epoch" in stage]
    assert _timeless(report.trials) == _timeless(whole[0].trials)
    assert is_same(adapter, load_adapter(whole[1]))


@pytest.mark.slow
def test_the_checkpoint_of_an_older_run_is_not_resumed_as_a_trial(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Path]
) -> None:
    class _InterruptedStart(Progress):
        def begin(self, stage: str, *, texts: int, later: int = 0) -> None:  # noqa: ARG002  # Progress has it
            raise KeyboardInterrupt

    output = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(_settings(backbone, search=None, dropout=0.3), output, Interrupt(3))
    assert checkpoint_path(output).exists()
    with pytest.raises(KeyboardInterrupt):
        fitted(_settings(backbone), output, _InterruptedStart())
    report, _ = fitted(_settings(backbone, resume=True), output)
    assert _timeless(report.trials) == _timeless(whole[0].trials)


def test_the_trials_of_another_search_are_refused(backbone: str, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(ResumeError, match="there is no interrupted search"):
        fitted(_settings(backbone, resume=True), output)
    with pytest.raises(KeyboardInterrupt):
        fitted(_settings(backbone), output, Interrupt(3))
    with pytest.raises(ResumeError, match="a search with other data, settings or backbone"):
        fitted(_settings(backbone, resume=True, learning_rate=1e-4), output)
    # Without --search it would go on with the first trial, and remove the others.
    with pytest.raises(ResumeError, match="of an interrupted run with --search or --method best"):
        fitted(_settings(backbone, resume=True, search=None), output)
    assert search_path(output).exists()
    for damage in (b"{", b"[]", b'{"run": "x", "trials": [1]}', b"\xff"):
        search_path(output).write_bytes(damage)
        with pytest.raises(ResumeError, match="cannot be read"):
            fitted(_settings(backbone, resume=True), output)


@pytest.mark.slow
def test_a_trial_below_the_median_is_ended_early(backbone: str, tmp_path: Path) -> None:
    """The file of the interrupted search is changed: the trials so far were perfect."""
    output = tmp_path / "a.safetensors"
    settings = _settings(backbone, search=WHOLE_TRIALS + 1)
    with pytest.raises(KeyboardInterrupt):
        fitted(settings, output, _InterruptedTrial(WHOLE_TRIALS + 1))
    content = json.loads(search_path(output).read_bytes())
    for trial in content["trials"][:-1]:
        trial["accuracies"] = [1.0] * len(trial["accuracies"])
    search_path(output).write_text(json.dumps(content))
    progress = RecordingProgress()
    report, _ = fitted(replace(settings, resume=True), output, progress)
    last = report.trials[-1]
    assert last.outcome is TrialOutcome.PRUNED
    assert last.epochs == LEAST_EPOCHS
    assert not last.chosen
    note = f"trial 4/4: ended early at {last.accuracy:.4f} after epoch {LEAST_EPOCHS}, best 1.0000"
    assert any(line.startswith(note) for line in progress.notes), progress.notes
    assert not checkpoint_path(output).exists()


class _InterruptedTrial(Progress):
    """Ctrl-C at the first step of a trial."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.stage = ""

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:  # noqa: ARG002  # Progress has it
        self.stage = stage

    def advance(
        self,
        texts: int,  # noqa: ARG002  # Progress has it
        *,
        loss: float | None = None,
        accuracy: float | None = None,  # noqa: ARG002  # Progress has it
    ) -> None:
        if loss is not None and self.stage.startswith(f"trial {self.number}/"):
            raise KeyboardInterrupt


def test_a_search_whose_losses_are_never_finite_fails(backbone: str, tmp_path: Path) -> None:
    wild = {"learning_rate": 10.0, "epochs": 50, "patience": 50, "weight_decay": 10.0}
    recorded = RecordingProgress()
    with pytest.raises(TrainingError, match="none of the 2 trials of the search ended with"):
        fitted(
            _settings(backbone, search=2, dropout=0.0, **wild), tmp_path / "a.safetensors", recorded
        )
    first = next(note for note in recorded.notes if note.startswith("trial "))
    assert first.startswith("trial 1/2: its loss was not finite: --insertion-layer ")
    assert not checkpoint_path(tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_progress_says_which_trial_and_the_best_so_far(backbone: str, tmp_path: Path) -> None:
    recorded = RecordingProgress()
    settings = _settings(
        backbone,
        method=MethodName.IDSPAM,
        search=2,
        epochs=1,
        insertion_layer=1,
        weight_decay=0.1,
    )
    report, _ = fitted(settings, tmp_path / "a.safetensors", recorded)
    first = report.trials[0].accuracy
    assert f"trial 2/2, epoch 1/1, best {first:.4f} (trial 1)" in recorded.stages
    line = f"trial 1/2: {first:.4f}, best {first:.4f} (trial 1): --dropout"
    assert any(note.startswith(line) for note in recorded.notes)
    # The layer stays the same, so what lies below it is computed once.
    lower = [stage for stage in recorded.stages if "lower layers" in stage]
    assert lower == ["trial 1/2, lower layers"]


def test_a_search_needs_validation_rows_and_something_to_choose(
    backbone: str, tmp_path: Path
) -> None:
    settings = _settings(backbone, validation_fraction=0.0)
    with pytest.raises(SettingsError, match="validation rows, and there are none"):
        fit(TRAIN, None, None, settings, tmp_path / "a.safetensors", Progress())
    every_setting = ("learning_rate", "weight_decay", "dropout", "insertion_layer", "batch_size")
    fault = "nothing to choose: you set --batch-size, --lr, --weight"
    with pytest.raises(SettingsError, match=fault):
        fitted(_settings(backbone, given=every_setting), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_proposals_depend_only_on_the_seed_and_the_trials_before() -> None:
    settings = FitSettings(seed=3, dropout=0.2)
    one = Proposals(settings, DEFAULTS, layers=6, epochs=9)
    seen: list[dict[str, object]] = []
    for number in range(FIRST_TRIALS + 3):
        # Built anew from the finished trials, as after an interruption.
        other = Proposals(settings, DEFAULTS, layers=6, epochs=9)
        for index, params in enumerate(seen):
            other.add(params, TrialOutcome.FINISHED, [0.1 * index, 0.5])
        mine, again = one.next(), other.next()
        assert mine.params == again.params
        assert "dropout" not in mine.params, "settings that are given are not searched"
        assert mine.params not in seen
        for epoch, accuracy in enumerate([0.1 * number, 0.5], start=1):
            mine.report(accuracy, epoch)
        one.end(mine, TrialOutcome.FINISHED, [0.1 * number, 0.5])
        seen.append(mine.params)
    assert seen[0] == {name: value for name, value in DEFAULTS.items() if name != "dropout"}


@pytest.mark.parametrize("changes", [{"weight_decay": 0.0}, {"learning_rate": 1.0}])
def test_the_search_space_includes_the_defaults(changes: dict[str, float]) -> None:
    defaults = DEFAULTS | changes
    assert Proposals(FitSettings(), defaults, layers=6, epochs=9).next().params == defaults
