"""`fit`: from data sets to an adapter file, its model card and its figures.

    (search ->) train.fit.training -> train.fit.finish

Knows no command line.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adapters.backbone.model import Backbone
from train.config.defaults import backbone_of, design_of
from train.config.recipe import recipe_of
from train.config.settings import FitSettings
from train.data.dataset import Dataset, check_same_task, check_trainable, split_validation
from train.errors import OutputError, ResumeError, SettingsError
from train.fit.export import provenance_of
from train.fit.finish import finish
from train.fit.init_from import Initial
from train.fit.search import Proposals, search
from train.fit.training import Training, set_up
from train.loop.checkpoint import state_path
from train.loop.distributed import Team, joined
from train.loop.encoded_splits import Kept
from train.loop.launch import Launch
from train.loop.progress import Progress
from train.methods.idspam import Idspam
from train.metrics import Metric
from train.report.model_card import check_card
from train.report.report import FitReport, TrialReport

METRIC = Metric.ACCURACY


def fit(
    train: Dataset,
    validation: Dataset | None,
    test: Dataset | None,
    settings: FitSettings,
    output: Path,
    progress: Progress,
) -> FitReport:
    """Train one adapter and write it to `output`, its card beside it; of several processes, the
    first one writes.

    Without `validation`, a stratified share of `train` is held out. The file is written once, at
    the end; until then the run's state lies beside it, for `settings.resume`.

    Raises:
        TrainingError: unusable data, settings or output, a loss that is not finite, no state to
            resume.
        AdapterError: the backbone cannot be loaded or run.
        OSError: a file cannot be read or written.
    """
    started = time.perf_counter()
    check_trainable(train)
    if validation is None and settings.validation_fraction > 0:
        train, validation = split_validation(
            train, fraction=settings.validation_fraction, seed=settings.seed
        )
    sets = {"train": train} | {
        name: found
        for name, found in (("validation", validation), ("test", test))
        if found is not None
    }
    launch = Launch.of_environment()
    _check(sets, settings, output, launch)
    initial = None if settings.init_from is None else Initial.read(settings.init_from)
    if initial is not None:
        settings = initial.completed(settings)
    with joined(launch, settings.device) as (team, device):
        settings = replace(settings, device=device)
        backbone = backbone_of(settings)
        if initial is not None:
            initial.check(settings, backbone)
        kept = Kept(sets, backbone, place=settings.cache.value)
        task = _Task(sets, backbone, kept, initial, team, output)
        try:
            return _run(task, settings, progress, started)
        finally:
            kept.close()


@dataclass(frozen=True, slots=True)
class _Task:
    """What stays the same while settings are tried."""

    sets: Mapping[str, Dataset]
    backbone: Backbone
    kept: Kept
    initial: Initial | None
    team: Team
    output: Path

    def begin(self, settings: FitSettings, progress: Progress) -> Training:
        """Set a run up, its weights as they start or as its state has them."""
        training = set_up(
            "idspam",
            self.sets,
            settings,
            self.backbone,
            judge="validation",
            metric=METRIC,
            state_file=state_path(self.output),
            progress=progress,
            team=self.team,
            kept=self.kept,
            starts_from=self.starts_from,
        )
        if self.initial is not None and not settings.resume:
            assert isinstance(training.method, Idspam)
            progress.note(self.initial.put_into(training.method))
        return training

    @property
    def starts_from(self) -> str:
        return "" if self.initial is None else self.initial.sha256


def _check(
    sets: Mapping[str, Dataset], settings: FitSettings, output: Path, launch: Launch
) -> None:
    """Find out before the training what would be found out after it."""
    train = sets["train"]
    for name, found in sets.items():
        if name != "train":
            check_same_task(train, found)
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{output}: a path that is not UTF-8") from None
    provenance_of(settings, train, {})
    check_card(output)
    recipe = recipe_of("idspam", settings, train, METRIC)
    if recipe.micro_batch > recipe.batch_size:
        raise SettingsError(
            [f"--micro-batch {recipe.micro_batch} is more than the batch of {recipe.batch_size}"]
        )
    if settings.search is not None:
        launch.check_alone("fit --search")
        if "validation" not in sets:
            raise SettingsError(
                ["--search compares its trials on validation rows, and there are none"]
            )
    elif settings.resume and not state_path(output).exists():
        raise ResumeError(f"{state_path(output)}: there is no interrupted run to resume")


def _run(task: _Task, settings: FitSettings, progress: Progress, started: float) -> FitReport:
    state = state_path(task.output)
    if state.exists() and not settings.resume:
        progress.note(f"{state}: an interrupted run's, replaced now; --resume goes on with it")
    chosen = settings
    trials: tuple[TrialReport, ...] = ()
    if settings.search is not None:
        chosen, trials = _searched(task, settings, progress)
    training = task.begin(chosen, progress)
    training.loop.fit(progress)
    return finish(
        training,
        replace(chosen, resume=settings.resume),
        trials,
        sets=task.sets,
        output=task.output,
        progress=progress,
        started=started,
    )


def _searched(
    task: _Task, settings: FitSettings, progress: Progress
) -> tuple[FitSettings, tuple[TrialReport, ...]]:
    """The settings that a search finds best on the validation rows."""
    design = design_of(settings, task.backbone)
    recipe = recipe_of("idspam", settings, task.sets["train"], METRIC)
    defaults = asdict(recipe) | asdict(design)
    proposals = Proposals(settings, defaults, layers=task.backbone.layers, epochs=recipe.epochs)
    identity = {
        "defaults": defaults,
        "space": list(proposals.space),
        "data": {name: [found.sha256, len(found)] for name, found in task.sets.items()},
        "backbone": task.backbone.identity.fingerprint,
        "starts_from": task.starts_from,
    }
    return search(
        task.begin,
        settings,
        proposals,
        output=task.output,
        run=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        progress=progress,
    )
