"""`fit`: from data sets to an adapter file, its model card and its report.

    data sets -> EncodedSplits -> (search ->) set_up -> Loop -> logits of every split
              -> temperature, storage type -> adapter file -> FitReport -> model card

`set_up` is also how experiments train every other method.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.backbone.loading import DEFAULT_BACKBONE
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, save_adapter
from adapters.format.spec import Calibration, Pooling
from train.config.defaults import (
    KnownSizes,
    Sizes,
    check_method,
    design_of,
    foreign_settings,
    load_backbone_for,
    method_of,
)
from train.config.recipe import Recipe, recipe_of
from train.config.settings import FitSettings, MethodName
from train.data.dataset import (
    Dataset,
    check_same_task,
    check_trainable,
    rows_sha256,
    split_validation,
)
from train.errors import OutputError, ResumeError, SettingsError, TrainingError
from train.fit.best import CANDIDATES, Candidates
from train.fit.check_data import CheckedData, check_data
from train.fit.decide import check_decision, choose_scoring, decide, decision_of
from train.fit.export import convert_for_storage, held_out_profile, provenance_of
from train.fit.init_from import InitialAdapter
from train.fit.search import Proposals, remove_search, saved_search, search, search_path
from train.loop.checkpoint import checkpoint_path, saved_identity
from train.loop.distributed import ProcessGroup, process_group
from train.loop.encoded_splits import EncodedSplits, Split
from train.loop.graphs import recorder_for
from train.loop.identity import differences, encode_identity, refusal
from train.loop.launch import Launch
from train.loop.loop import Loop
from train.loop.progress import Progress
from train.methods import build
from train.methods.method import AdapterMethod, Design, Method
from train.metrics import AnyMetrics, Metric, assess
from train.objective import Objective
from train.report.baselines import head_only, majority
from train.report.card_file import card_path
from train.report.data_checks import check_lists, repeats_path, suspects_path
from train.report.linear_head import ITERATIONS, POOLINGS, Features, features_of
from train.report.model_card import check_card, write_card
from train.report.report import Baseline, DataReport, FitReport, TrialReport
from train.set_metrics import assess_sets


@dataclass(frozen=True, slots=True)
class Training:
    """One method on one task, ready to run. splits: by name, `train` among them.

    encoding_seconds: how long encoding and filling the caches took.
    """

    method: Method
    labels: tuple[str, ...]
    loop: Loop
    encoded: EncodedSplits
    splits: Mapping[str, Split]
    encoding_seconds: float

    @property
    def recipe(self) -> Recipe:
        """How long, how fast and towards which metric it is trained."""
        return self.loop.recipe

    @property
    def classes(self) -> dict[str, Tensor]:
        """True classes of every split, int64 [rows]."""
        return {name: split.classes for name, split in self.splits.items()}

    def logits(self) -> dict[str, Tensor]:
        """Logits of every split but the training rows, float32 [rows, labels] on the CPU."""
        return {
            name: self.loop.logits(split) for name, split in self.splits.items() if name != "train"
        }

    def close(self) -> None:
        """Free the cached trunk states."""
        self.encoded.close()


def fit(
    train: Dataset,
    validation: Dataset | None,
    test: Dataset | None,
    settings: FitSettings,
    output: Path,
    progress: Progress,
) -> FitReport:
    """Train one adapter and write it to `output`, with its model card beside it.

    Without `validation`, a stratified share of `train` is held out. The file is written once, at
    the end. Until then the run's checkpoint is beside it, for `settings.resume`. Under a launcher
    of several processes the main process writes.

    Raises:
        TrainingError: unusable data, settings or output, a loss that is not finite, no checkpoint
            to resume.
        AdapterError: the backbone cannot be loaded or run.
        OSError: a file cannot be read or written.
    """
    started = time.perf_counter()
    check_trainable(train)
    if validation is None and settings.validation_fraction > 0:
        train, validation = split_validation(
            train, fraction=settings.validation_fraction, seed=settings.seed
        )
    sets = {"train": train}
    sets |= {"validation": validation} if validation is not None else {}
    sets |= {"test": test} if test is not None else {}
    launch = Launch.from_environment()
    initial = None if settings.init_from is None else InitialAdapter.read(settings.init_from)
    if initial is not None:
        settings = initial.fill_in(settings)
    _check(sets, settings, output, launch)
    if not settings.drop_leaks:
        _check_resumed(sets, settings, output, initial)
    checked = check_data(sets, progress, drop=settings.drop_leaks)
    if settings.drop_leaks:
        check_decision(checked.sets, settings)
    sets = checked.sets
    if settings.drop_leaks:
        # Which rows there are is known only now.
        _check_resumed(sets, settings, output, initial)
    with process_group(launch, settings.device) as (group, device):
        settings = replace(settings, device=device)
        progress.note(f"loading the backbone {settings.backbone or DEFAULT_BACKBONE}")
        backbone = load_backbone_for(settings)
        if initial is not None:
            initial.check(settings, backbone)
        encoded = EncodedSplits(sets, backbone, place=settings.cache.value)
        job = _FitJob(sets, backbone, encoded, initial, group, output, checked)
        try:
            chosen, trials = job.choose_settings(settings, progress)
            training = job.set_up(chosen, progress)
            checked.read(
                training.splits,
                backbone.encoder,
                progress,
                max_length=training.method.design.max_length,
            )
            training.loop.fit(progress)
            used = replace(chosen, resume=settings.resume)
            return job.write(training, used, trials, progress, started=started)
        finally:
            encoded.close()


def _check(
    sets: Mapping[str, Dataset], settings: FitSettings, output: Path, launch: Launch
) -> None:
    """Refuse before the training what would otherwise fail after it."""
    train = sets["train"]
    _check_same_task(sets)
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{output}: a path that is not UTF-8") from None
    check_method(settings)
    provenance_of(settings, train, {})
    check_card(output)
    check_lists(output)
    _check_sources(sets, output)
    method = method_of(settings)
    if method is MethodName.BEST:
        _check_best(sets, settings, launch)
        method = CANDIDATES[0]
    recipe = recipe_of(method, settings, train, metric_of(train))
    if recipe.micro_batch > recipe.batch_size:
        raise SettingsError(
            [f"--micro-batch {recipe.micro_batch} is more than the batch of {recipe.batch_size}"]
        )
    check_decision(sets, settings)
    if settings.search is not None:
        launch.check_single_process("fit --search")
        if "validation" not in sets:
            raise SettingsError(
                ["--search compares its trials on validation rows, and there are none"]
            )
    elif settings.resume and not (
        checkpoint_path(output).exists() or method_of(settings) is MethodName.BEST
    ):
        raise ResumeError(f"{checkpoint_path(output)}: there is no interrupted run to resume")


def _check_resumed(
    sets: Mapping[str, Dataset],
    settings: FitSettings,
    output: Path,
    initial: InitialAdapter | None,
) -> None:
    """Refuse the state of another run before the backbone is loaded. What only the backbone tells
    is checked again when the state is read.

    Raises:
        ResumeError: with what differs.
    """
    if not settings.resume:
        return
    searched = settings.search is not None or method_of(settings) is MethodName.BEST
    if not searched and search_path(output).exists():
        raise ResumeError(
            f"{search_path(output)}: of an interrupted run with --search or --method best, which "
            "is resumed with that flag; --overwrite begins anew"
        )
    if searched and not search_path(output).exists():
        raise ResumeError(f"{search_path(output)}: there is no interrupted search to resume")
    saved = saved_search(output) if searched else saved_identity(checkpoint_path(output))
    try:
        sizes = KnownSizes(**saved["sizes"])
    except (KeyError, TypeError):
        # Damaged, or of an earlier version: refused when it is read.
        return
    starts_from = "" if initial is None else initial.sha256
    if method_of(settings) is MethodName.BEST:
        now = _identity_of_best(sets, settings, sizes)
    elif searched:
        now = _identity_of_search(sets, settings, sizes, starts_from)
    else:
        metric = metric_of(sets["train"])
        now = _identity_of_run(method_of(settings), sets, settings, sizes, metric, starts_from)
    if found := differences(saved, now):
        path = search_path(output) if searched else checkpoint_path(output)
        raise ResumeError(refusal(path, "search" if searched else "run", found))


def _check_sources(sets: Mapping[str, Dataset], output: Path) -> None:
    """
    Raises:
        OutputError: the run would replace a file that it reads.
    """
    for written in (output, card_path(output), repeats_path(output), suspects_path(output)):
        for name, dataset in sets.items():
            # A data set of the hub is no path.
            with suppress(OSError, ValueError):
                if Path(dataset.source).samefile(written):
                    raise OutputError(
                        f"{written} is the file of --{name}, and this run would write it anew: "
                        "give it another name first"
                    )


def _check_best(sets: Mapping[str, Dataset], settings: FitSettings, launch: Launch) -> None:
    launch.check_single_process("fit --method best")
    faults = [
        f"--method best trains several methods: {flag} is for one of them"
        for flag, value in (("--search", settings.search), ("--init-from", settings.init_from))
        if value is not None
    ]
    if "validation" not in sets:
        faults.append("--method best compares methods on validation rows, and there are none")
    if faults:
        raise SettingsError(faults)


def _check_same_task(sets: Mapping[str, Dataset]) -> None:
    for name, dataset in sets.items():
        if name != "train":
            check_same_task(sets["train"], dataset)


# Settings that do not change what a run trains.
_NOT_DECISIVE = ("resume", "command", "given", "device", "cache", "data_name", "data_licence")


@dataclass(frozen=True, slots=True)
class _FitJob:
    """What all trials of one `fit` share."""

    sets: Mapping[str, Dataset]
    backbone: Backbone
    encoded: EncodedSplits
    initial: InitialAdapter | None
    group: ProcessGroup
    output: Path
    checked: CheckedData

    def choose_settings(
        self, settings: FitSettings, progress: Progress
    ) -> tuple[FitSettings, tuple[TrialReport, ...]]:
        """The settings to train with: those given, or the best of a search and all its trials."""
        checkpoint = checkpoint_path(self.output)
        if checkpoint.exists() and not settings.resume:
            progress.note(
                f"{checkpoint}: replacing the state of an interrupted run; --resume continues it"
            )
        if method_of(settings) is MethodName.BEST:
            return self._choose_method(settings, progress)
        if settings.search is None:
            return settings, ()
        sizes = KnownSizes.of(self.backbone)
        defaults = _defaults_of(self.sets["train"], settings, sizes)
        proposals = Proposals(settings, defaults, layers=sizes.layers, epochs=defaults["epochs"])
        identity = {
            **_identity_of_search(self.sets, settings, sizes, self._starts_from),
            "space": list(proposals.space),
            "backbone": self.backbone.identity.fingerprint,
        }
        return search(
            lambda trial, shown: self.set_up(trial, shown).loop,
            settings,
            proposals,
            output=self.output,
            run=encode_identity(identity),
            progress=progress,
        )

    def _choose_method(
        self, settings: FitSettings, progress: Progress
    ) -> tuple[FitSettings, tuple[TrialReport, ...]]:
        """The settings with the method that is kept, and a trial of each candidate."""
        identity = {
            **_identity_of_best(self.sets, settings, KnownSizes.of(self.backbone)),
            "backbone": self.backbone.identity.fingerprint,
        }
        chosen, trials = search(
            lambda trial, shown: self.set_up(trial, shown).loop,
            replace(settings, search=len(CANDIDATES)),
            Candidates(),
            output=self.output,
            run=encode_identity(identity),
            progress=progress,
        )
        return replace(chosen, search=None), trials

    def set_up(self, settings: FitSettings, progress: Progress) -> Training:
        """A run with its initial weights, or with those of its checkpoint."""
        training = set_up(
            method_of(settings),
            self.sets,
            settings,
            self.backbone,
            selection="validation",
            metric=metric_of(self.sets["train"]),
            checkpoint_file=checkpoint_path(self.output),
            progress=progress,
            group=self.group,
            encoded=self.encoded,
            starts_from=self._starts_from,
        )
        if self.initial is not None and not settings.resume:
            assert isinstance(training.method, AdapterMethod)
            progress.note(self.initial.copy_into(training.method))
        return training

    def write(
        self,
        training: Training,
        settings: FitSettings,
        trials: tuple[TrialReport, ...],
        progress: Progress,
        *,
        started: float,
    ) -> FitReport:
        """Write the trained adapter and its card; remove the checkpoint and the search's files.

        Args:
            started: when the run began, by `time.perf_counter`.

        Raises:
            TrainingError: the weights give logits that are not finite, or no threshold reaches the
            precision that is asked for.
            OSError: a file cannot be written.
        """
        trained, loop, classes = training.method, training.loop, training.classes
        assert isinstance(trained, AdapterMethod)
        method = trained.folded()
        loop.answer_with(method)
        objective, exact = method.objective, training.logits()
        _check_finite(exact)
        scoring = choose_scoring(objective, exact, classes, settings)
        adapter, logits = convert_for_storage(
            method,
            exact,
            settings.storage_dtype,
            scoring.temperature,
            scoring.thresholds,
            compute_logits=training.logits,
        )
        if logits is not exact:
            _check_finite(logits)
            scoring = choose_scoring(objective, logits, classes, settings)
        temperature, thresholds = scoring.temperature, scoring.thresholds
        decision = None
        if not method.spec.multi_label:
            try:
                decision = decide(logits, classes, settings, temperature=temperature)
            except SettingsError:
                # Nothing may be left of a run that was refused.
                self._remove_states()
                raise
        progress.note("training the head-only control")
        caches = {name: split.cache for name, split in training.splits.items()}
        progress.begin("head-only control, states", texts=sum(map(len, caches.values())))
        features = features_of(method.backbone, caches, advance=progress.advance)
        rows = len(caches["train"])
        progress.begin("head-only control, head", texts=rows * ITERATIONS * len(POOLINGS))
        controls, pooling = _controls(training, features, advance=progress.advance)
        metrics = measure_splits(
            objective, logits, classes, thresholds=thresholds, temperature=temperature
        )
        provenance = provenance_of(settings, self.sets["train"], metrics)
        calibration = Calibration(temperature=temperature)
        spec = adapter.spec.model_copy(
            update={
                "calibration": calibration,
                "decision": decision_of(decision),
                "thresholds": thresholds,
                "provenance": provenance,
            }
        )
        profile = held_out_profile(
            spec, training.splits, logits, unknown_id=self.backbone.encoder.unknown_id
        )
        spec = spec.model_copy(update={"profile": profile})
        if self.group.rank == 0:
            save_adapter(self.output, replace(adapter, spec=spec))
        checks = self.checked.finish(
            objective,
            spec.activation,
            features[pooling]["train"],
            classes["train"],
            spec.labels,
            self.output,
            seed=settings.seed,
            write=self.group.rank == 0,
        )
        epochs, cache = loop.checkpoint.history, training.splits["train"].cache
        cache_seconds = round(training.encoding_seconds, 3)
        report = FitReport(
            output=str(self.output),
            card=str(card_path(self.output)),
            validation=metrics.get("validation"),
            test=metrics.get("test"),
            majority=controls["majority"],
            head_only=controls["head_only"],
            trainable_parameters=trained.size,
            seconds=time.perf_counter() - started,
            seconds_per_epoch=sum(epoch.seconds for epoch in epochs) / len(epochs),
            epochs=tuple(epochs),
            best_epoch=loop.checkpoint.best_epoch,
            temperature=temperature,
            settings=self._used_settings(settings, training, adapter),
            data={name: DataReport.of(dataset) for name, dataset in self.sets.items()},
            cache={"mode": cache.place, "bytes": cache.nbytes, "seconds": cache_seconds},
            assessments={
                name: assess_sets(
                    logits[name],
                    classes[name],
                    spec.labels,
                    thresholds=spec.label_thresholds,
                    temperature=temperature,
                )
                if spec.multi_label
                else assess(logits[name], classes[name], spec.labels, temperature=temperature)
                for name in logits
            },
            trials=trials,
            command=settings.command,
            thresholds=dict(zip(spec.labels, thresholds, strict=True)) if thresholds else None,
            calibration=scoring.calibrated,
            decision=decision,
            checks=checks,
        )
        if self.group.rank == 0:
            write_card(
                self.output,
                report,
                spec,
                device=self.backbone.device,
                processes=self.group.world_size,
                paired=self.sets["train"].paired,
            )
            self._remove_states()
        return report

    def _remove_states(self) -> None:
        """Remove what a run keeps beside its output until it ends."""
        if self.group.rank == 0:
            checkpoint_path(self.output).unlink(missing_ok=True)
            remove_search(self.output)

    @property
    def _starts_from(self) -> str:
        return "" if self.initial is None else self.initial.sha256

    def _used_settings(
        self, settings: FitSettings, training: Training, adapter: Adapter
    ) -> dict[str, Any]:
        """The settings, with the values that were chosen for those left open."""
        values = asdict(settings)
        del values["given"]
        method, design = method_of(settings), training.method.design
        chosen = asdict(training.recipe) | asdict(design)
        chosen |= {
            "method": method,
            "alpha": design.rank * design.scaling,
            "sites": ",".join(design.sites),
            "tuned_layers": "-".join(str(each) for each in _first_and_last(design)),
        }
        values |= {name: value for name, value in chosen.items() if name in values}
        values |= dict.fromkeys(foreign_settings(method) - {"preset"})
        storage_dtype = next(iter(adapter.tensors.values())).dtype
        return values | {
            "backbone": self.backbone.identity.name,
            "device": str(self.backbone.device),
            "processes": self.group.world_size,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "storage_dtype": str(storage_dtype).removeprefix("torch."),
        }


def _first_and_last(design: Design) -> tuple[int, int]:
    assert design.tuned_layers is not None
    first, end = design.tuned_layers
    return first, end - 1


def set_up(
    method_name: str,
    sets: Mapping[str, Dataset],
    settings: FitSettings,
    backbone: Backbone,
    *,
    selection: str,
    metric: Metric,
    checkpoint_file: Path,
    progress: Progress,
    group: ProcessGroup | None = None,
    encoded: EncodedSplits | None = None,
    starts_from: str = "",
) -> Training:
    """Encode the data, fill the caches, build the method; resume if the settings say so.

    Args:
        sets: `train`, and the data sets to measure.
        selection: the data set that decides which epoch is the best; if there is none of this name,
            the last epoch is taken.
        encoded: these data sets, where several runs share them.
        starts_from: identifies the weights with which the caller will replace the initial ones.

    Raises:
        TrainingError: unusable data or settings, no checkpoint to resume.
    """
    train = sets["train"]
    check_trainable(train)
    _check_same_task(sets)
    design, labels = _design_of(method_name, settings, train, backbone), train.labels
    random = torch.Generator().manual_seed(settings.seed)
    method = build(method_name, backbone, design, labels, random).to(backbone.device)
    recipe = recipe_of(method_name, settings, train, metric)
    started = time.perf_counter()
    encoded = encoded or EncodedSplits(sets, backbone, place=settings.cache.value)
    splits = encoded.splits(method, progress)
    encoding_seconds = time.perf_counter() - started
    method.objective.start(method.head.out_bias, splits["train"].classes)
    # Decides how a run continues: a checkpoint with another identity is refused.
    sizes = KnownSizes.of(backbone)
    identity = {
        **_identity_of_run(method_name, sets, settings, sizes, metric, starts_from),
        "backbone": backbone.identity.fingerprint,
    }
    loop = Loop(
        method,
        recipe,
        train=splits["train"],
        validation=splits.get(selection),
        checkpoint_file=checkpoint_file,
        run=encode_identity(identity),
        group=group,
        recorder=recorder_for(method, recipe, group),
    )
    if settings.resume:
        loop.resume()
    return Training(method, labels, loop, encoded, splits, encoding_seconds)


def metric_of(train: Dataset) -> Metric:
    """What decides which epoch, and which trial of a search, is the best."""
    return Metric.default(multi_label=train.multi_label)


def measure_splits(
    objective: Objective,
    logits: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    *,
    thresholds: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> dict[str, AnyMetrics]:
    """Metrics of every split that has logits."""
    predicted = {
        name: objective.predict(split_logits, thresholds=thresholds, temperature=temperature)
        for name, split_logits in logits.items()
    }
    return {
        name: objective.measure(answers, classes[name], labels=logits[name].shape[1])
        for name, answers in predicted.items()
    }


def _check_finite(logits: Mapping[str, Tensor]) -> None:
    for name, split_logits in logits.items():
        if not bool(split_logits.isfinite().all()):
            raise TrainingError(
                f"the trained weights give logits that are not finite for some rows of {name}; "
                "a lower --lr usually helps"
            )


def _controls(
    training: Training, features: Features, *, advance: Callable[[int], None]
) -> tuple[dict[str, Baseline], Pooling]:
    """The results that need no prompt, and what the head alone reads."""
    method, classes = training.method, training.classes
    objective, labels = method.objective, len(training.labels)
    others = {name: true for name, true in classes.items() if name != "train"}
    head, pooling = head_only(objective, features, classes, labels=labels, advance=advance)
    results = {
        "majority": majority(objective, classes["train"], others, labels=labels),
        "head_only": head,
    }
    return {
        name: Baseline(metrics.get("validation"), metrics.get("test"))
        for name, metrics in results.items()
    }, pooling


def _data_identity(sets: Mapping[str, Dataset]) -> dict[str, list[str | int]]:
    """Of the rows, too: another column of the same file is another task."""
    return {
        name: [dataset.sha256, len(dataset), rows_sha256(dataset.examples)]
        for name, dataset in sets.items()
    }


def _design_of(method: str, settings: FitSettings, train: Dataset, sizes: Sizes) -> Design:
    design = design_of(method, settings, sizes)
    return replace(design, activation="sigmoid") if train.multi_label else design


def _identity_of_run(
    method: str,
    sets: Mapping[str, Dataset],
    settings: FitSettings,
    sizes: KnownSizes,
    metric: Metric,
    starts_from: str,
) -> dict[str, Any]:
    """All but the backbone's weights."""
    train = sets["train"]
    return {
        "method": method,
        "dtype": settings.dtype,
        "sizes": asdict(sizes),
        "data": _data_identity(sets),
        "labels": train.labels,
        "design": asdict(_design_of(method, settings, train, sizes)),
        "recipe": asdict(recipe_of(method, settings, train, metric)),
        "starts_from": starts_from,
    }


def _defaults_of(train: Dataset, settings: FitSettings, sizes: Sizes) -> dict[str, Any]:
    """What a run without a search would have, of the settings that its method has."""
    method = method_of(settings)
    recipe = recipe_of(method, settings, train, metric_of(train))
    chosen = asdict(recipe) | asdict(design_of(method, settings, sizes))
    return {name: chosen[name] for name in chosen if name not in foreign_settings(method)}


def _identity_of_search(
    sets: Mapping[str, Dataset], settings: FitSettings, sizes: KnownSizes, starts_from: str
) -> dict[str, Any]:
    """All but the backbone's weights and the space of the search."""
    return {
        "method": method_of(settings),
        "dtype": settings.dtype,
        "sizes": asdict(sizes),
        "defaults": _defaults_of(sets["train"], settings, sizes),
        "data": _data_identity(sets),
        "starts_from": starts_from,
    }


def _identity_of_best(
    sets: Mapping[str, Dataset], settings: FitSettings, sizes: KnownSizes
) -> dict[str, Any]:
    """All but the backbone's weights."""
    values = asdict(settings)
    return {
        "settings": {name: values[name] for name in values if name not in _NOT_DECISIVE},
        "sizes": asdict(sizes),
        "candidates": CANDIDATES,
        "data": _data_identity(sets),
    }
