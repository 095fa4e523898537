"""Worker processes that run the cells of an experiment, and their messages to the parent.

    parent: run_cells -> ReadyQueue -> _Pool -> _Worker  == pipe ==  child: serve -> run -> Outcome

If a worker dies, only its own cell fails, and the worker is replaced. A worker whose cell failed is
replaced as well, because the state of its device is unknown. `concurrent.futures` would give up all
cells when one process dies.
"""

import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file, save
from transformers.utils import logging

from adapters.backbone.loading import resolve_device
from adapters.backbone.model import Backbone
from adapters.errors import AdapterError
from adapters.format.durable import write_atomically
from adapters.format.files import save_adapter
from train.config.defaults import load_backbone_for, settings_for
from train.config.settings import FitSettings
from train.errors import DataError, ResumeError, TrainingError
from train.experiments.answers import packed
from train.experiments.cells import (
    Cell,
    Outcome,
    PlannedCell,
    RunReport,
    checkpoint_path,
    write_outcome,
)
from train.experiments.display import Display
from train.fit.export import provenance_of
from train.fit.fit import Training, measure_splits, set_up
from train.loop.memory import peak_memory, reset_peak
from train.loop.progress import EpochReport, Progress
from train.methods import METHODS
from train.methods.method import AdapterMethod
from train.report.baselines import majority
from train.thresholds import choose_thresholds

POLL_SECONDS = 0.25
# Enough to save the training state of a large backbone's fine-tuning.
SAVE_SECONDS = 60.0
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has finished its imports, and reads the next message at once."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A line of news."""

    text: str


@dataclass(frozen=True, slots=True)
class Progressed:
    """The stage of the run, such as `epoch 3/20`, and its finished share from 0 to 1."""

    stage: str
    share: float


@dataclass(frozen=True, slots=True)
class EpochDone:
    """An epoch and its measurement on the selection rows have ended."""

    report: EpochReport


News: TypeAlias = Noted | Progressed | EpochDone
Message: TypeAlias = Ready | News | Outcome


@dataclass(frozen=True, slots=True)
class Placement:
    """Where cells run.

    devices: workers take them in turn. jobs: how many workers. threads: of torch, in every worker.
    """

    devices: tuple[str, ...]
    jobs: int
    threads: int


def run_cells(
    planned: Sequence[PlannedCell],
    placement: Placement,
    *,
    cells: Path,
    display: Display,
    ended: Callable[[Outcome], None],
) -> None:
    """Run all cells; returns when each of them has an outcome in the folder `cells`.

    Args:
        ended: called with every outcome after it is written.

    Raises:
        KeyboardInterrupt: after every worker has saved its training state; a second Ctrl-C does not
            wait for that.
    """
    queue = ReadyQueue(planned)
    pool = _Pool(placement, cells)

    def finish(outcome: Outcome) -> None:
        display.ended(outcome)
        ended(outcome)
        for dependent in queue.ended(outcome):
            failure = f"{outcome.cell.title}, which it starts from, failed"
            lost = Outcome(dependent.cell, None, failure, device=outcome.device)
            write_outcome(cells, lost)
            finish(lost)

    try:
        while queue.planned or pool.busy:
            while (ready := queue.first()) is not None and (worker := pool.idle()) is not None:
                queue.take(ready)
                display.started(ready.cell, worker.device)
                worker.start(ready)
            for worker, message in pool.messages():
                assert worker.planned is not None, "only busy workers are read"
                match message:
                    case Ready():
                        pass
                    case Outcome():
                        pool.release(worker, failed=message.failure is not None)
                        finish(message)
                    case _:
                        _show(display, worker.planned.cell, message)
            display.tick()
    except KeyboardInterrupt:
        display.note("interrupted: saving the running cells; press Ctrl-C again to discard them")
        pool.interrupt()
        raise
    finally:
        pool.close()


def _show(display: Display, cell: Cell, news: News) -> None:
    match news:
        case Noted(text):
            display.note(f"{cell.title}: {text}")
        case Progressed(stage, share):
            display.progressed(cell, stage, share)
        case EpochDone(report):
            display.epoch_done(cell, report)


class ReadyQueue:
    """Cells that have not started yet, in the order in which they should run.

    Seed by seed, so that a stopped experiment has complete tables for some seeds. Within a seed the
    longest first, because a long one at the end would run alone.
    """

    def __init__(self, planned: Sequence[PlannedCell]) -> None:
        seeds = list(dict.fromkeys(each.cell.seed for each in planned))
        self.planned = sorted(planned, key=lambda each: (seeds.index(each.cell.seed), -each.cost))
        self._unfinished = {each.cell for each in planned}

    def first(self) -> PlannedCell | None:
        """The next one that can run: it does not start from an unfinished cell."""
        return next((each for each in self.planned if each.after not in self._unfinished), None)

    def take(self, planned: PlannedCell) -> None:
        """Remove a cell, because it starts now."""
        self.planned.remove(planned)

    def ended(self, outcome: Outcome) -> list[PlannedCell]:
        """A cell has ended; removes and returns the cells that can never run because of that."""
        self._unfinished.remove(outcome.cell)
        if outcome.failure is None:
            return []
        lost = [each for each in self.planned if each.after == outcome.cell]
        for planned in lost:
            self.take(planned)
        return lost


class _Pool:
    """At most `placement.jobs` workers; each is started when there is a cell for it."""

    def __init__(self, placement: Placement, cells: Path) -> None:
        self._placement = placement
        self._cells = cells
        self._workers: list[_Worker | None] = [None] * placement.jobs

    @property
    def busy(self) -> list["_Worker"]:
        return [worker for worker in self._workers if worker and worker.planned]

    def idle(self) -> "_Worker | None":
        """A worker without a cell, started if necessary; None if all are busy."""
        for worker in self._workers:
            if worker is not None and worker.planned is None:
                return worker
        if None not in self._workers:
            return None
        index = self._workers.index(None)
        device = self._placement.devices[index % len(self._placement.devices)]
        worker = _Worker(device=device, threads=self._placement.threads, cells=self._cells)
        self._workers[index] = worker
        return worker

    def messages(self) -> Iterator[tuple["_Worker", Message]]:
        """New messages of busy workers; a dead worker's last message is a failed outcome."""
        busy = self.busy
        readable = connection.wait([worker.pipe for worker in busy], timeout=POLL_SECONDS)
        for worker in busy:
            if worker.pipe not in readable:
                continue
            message = worker.receive()
            if message is None:
                assert worker.planned is not None, "only busy workers are waited for"
                cell = worker.planned.cell
                message = Outcome(cell, None, worker.cause_of_death(), device=worker.device)
                write_outcome(self._cells, message)
            yield worker, message

    def release(self, worker: "_Worker", *, failed: bool) -> None:
        """Its cell has ended."""
        worker.planned = None
        if failed:
            self._workers[self._workers.index(worker)] = None
            worker.close()

    def interrupt(self) -> None:
        """Make busy workers save their training state and exit."""
        busy = self.busy
        for worker in busy:
            worker.interrupt()
        end = time.monotonic() + SAVE_SECONDS
        for worker in busy:
            while worker.process.is_alive() and time.monotonic() < end:
                # A full pipe would block the worker: keep reading its last messages.
                if worker.pipe.poll(POLL_SECONDS) and worker.receive() is None:
                    worker.process.join(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in self._workers:
            if worker is not None:
                worker.close()
        self._workers = [None] * self._placement.jobs


class _Worker:
    """The parent's side of one process and its pipe. planned: the cell that it runs now."""

    def __init__(self, *, device: str, threads: int, cells: Path) -> None:
        self.device = device
        self.planned: PlannedCell | None = None
        self._ready = self._has_news = False
        context = multiprocessing.get_context("spawn")
        self.pipe, childs_end = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=serve,
            args=(childs_end,),
            kwargs={"device": device, "threads": threads, "cells": str(cells)},
            daemon=True,
        )
        with _interrupts_blocked():
            self.process.start()
        # The child now holds the only writing end: if it dies, a read of the pipe ends.
        childs_end.close()

    def start(self, planned: PlannedCell) -> None:
        """Give it a cell; it is sent once the worker is ready.

        The rows of a cell do not fit into the pipe's buffer: sending them earlier would block until
        the worker's imports are done, and delay the start of all other workers.
        """
        self.planned, self._has_news = planned, False
        if self._ready:
            self._send(planned)

    def receive(self) -> Message | None:
        """The next message; None if the worker is dead."""
        try:
            message: Message = self.pipe.recv()
        except (EOFError, OSError):
            return None
        if isinstance(message, Ready):
            self._ready = True
            if self.planned is not None:
                self._send(self.planned)
        else:
            self._has_news = True
        return message

    def _send(self, planned: PlannedCell) -> None:
        # If the worker has died, the next `receive` notices.
        with suppress(BrokenPipeError):
            self.pipe.send(planned)

    def cause_of_death(self) -> str:
        """Why the process ended, for people."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"its process ended with code {code}"
        hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-code).name}{hint}"

    def interrupt(self) -> None:
        """Make it save its training state and exit; kill it if there is nothing to save yet."""
        if not self._has_news:
            self.process.kill()
            return
        assert self.process.pid is not None, "it was started"
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A new process inherits the mask, so that a Ctrl-C during its first imports is held back."""
    # Start the tracker first: it would start with the first process, and unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(pipe: Connection, *, device: str, threads: int, cells: str) -> None:
    """The worker process: run the cells that come through `pipe` and answer with outcomes.

    Ends when the pipe is closed. Ctrl-C on a terminal reaches only the parent, which passes it on.
    """
    os.setpgrp()
    progress = _PipeProgress(pipe)
    signal.signal(signal.SIGINT, lambda *_: progress.interrupt())
    # The parent blocked SIGINT before it started this process.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    # Otherwise every worker prints the same remarks about the backbone's files into the display.
    logging.set_verbosity_error()
    backbones = Backbones()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        pipe.send(Ready())
        while True:
            planned = pipe.recv()
            outcome = _outcome(planned, progress, backbones, device=device, cells=Path(cells))
            write_outcome(Path(cells), outcome)
            pipe.send(outcome)
            # Give unused GPU memory back to the other workers on this device.
            gc.collect()
            torch.cuda.empty_cache()


def _exit_with_parent() -> None:
    """An orphan would keep running beside the workers of the next start."""
    parent = parent_process()
    assert parent is not None, "serve runs in a process of its own"
    connection.wait([parent.sentinel])
    os._exit(1)


class _PipeProgress(Progress):
    """Sends progress to the parent, twice a second at most.

    It alone raises an interruption. So a run stops only where it can save its state: between two
    steps, never in the middle of an update or a file.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._interrupted = False
        self._stage, self._texts, self._done, self._last = "", 0, 0, 0.0

    def interrupt(self) -> None:
        """End the run at its next step."""
        self._interrupted = True

    def note(self, message: str) -> None:
        self._send(Noted(message))

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:  # noqa: ARG002  # inherited
        self._stage, self._texts, self._done = stage, texts, 0
        self._send_progress()

    def advance(
        self,
        texts: int,
        *,
        loss: float | None = None,  # noqa: ARG002  # inherited
        accuracy: float | None = None,  # noqa: ARG002  # inherited
    ) -> None:
        self._done += texts
        if self._interrupted or time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._send_progress()

    def epoch_done(self, report: EpochReport) -> None:
        self._send(EpochDone(report))

    def _send_progress(self) -> None:
        self._last = time.monotonic()
        self._send(Progressed(self._stage, self._done / max(self._texts, 1)))

    def _send(self, news: News) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        try:
            self._pipe.send(news)
        except OSError:
            # The parent is gone: nobody wants the result.
            raise KeyboardInterrupt from None


class Backbones:
    """Loads a backbone once for all runs of a process that do not change it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Backbone] = {}

    def take(self, settings: FitSettings, *, changes: bool) -> Backbone:
        """The backbone of the settings. changes: whether the caller will change it."""
        key = (settings.backbone, settings.device, settings.dtype)
        backbone = self._kept.pop(key, None) or load_backbone_for(settings)
        if not changes:
            self._kept[key] = backbone
        return backbone


def _outcome(
    planned: PlannedCell, progress: Progress, backbones: Backbones, *, device: str, cells: Path
) -> Outcome:
    """Run a cell; any error becomes its outcome."""
    planned = replace(planned, settings=replace(planned.settings, device=device))
    checkpoint, trace = checkpoint_path(cells, planned.cell), None
    try:
        try:
            report = _run(planned, checkpoint, progress, backbones)
        except ResumeError as error:
            progress.note(f"{planned.cell.title}: {error}; starting it over")
            checkpoint.unlink(missing_ok=True)
            report = _run(planned, checkpoint, progress, backbones)
        return Outcome(planned.cell, report, None, device=_device_name(device))
    except (TrainingError, AdapterError) as error:
        failure = str(error) or type(error).__name__
    except (MemoryError, torch.OutOfMemoryError) as error:
        failure = f"out of memory: {error}"
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
    line = " ".join(failure.split())
    return Outcome(planned.cell, None, line, device=_device_name(device), trace=trace)


def _device_name(device: str) -> str:
    target = resolve_device(device)
    return torch.cuda.get_device_name(target) if target.type == "cuda" else target.type


def _run(
    planned: PlannedCell, checkpoint: Path, progress: Progress, backbones: Backbones
) -> RunReport:
    """Train and measure a cell. checkpoint: the file that an interrupted run continues from.

    Raises:
        TrainingError: unusable data or settings, a loss that is not finite.
        AdapterError: the backbone cannot be loaded or run.
    """
    method = planned.cell.method
    settings = settings_for(method, planned.settings)
    backbone = backbones.take(settings, changes=METHODS[method].changes_backbone)
    reset_peak(backbone.device)
    training = set_up(
        method,
        planned.data.splits,
        replace(settings, resume=checkpoint.exists()),
        backbone,
        selection="selection",
        metric=planned.data.metric,
        checkpoint_file=checkpoint,
        progress=progress,
    )
    try:
        if planned.initial is not None and not checkpoint.exists():
            _load_initial(training, planned.initial)
        training.loop.fit(progress)
        report = _report(method, training)
        if planned.adapter is not None:
            _keep(training, planned, planned.adapter)
        if planned.weights is not None:
            write_atomically(planned.weights, save(training.method.snapshot()))
    finally:
        training.close()
    checkpoint.unlink(missing_ok=True)
    return report


def _keep(training: Training, planned: PlannedCell, path: Path) -> None:
    """Write the trained weights as an adapter file, with thresholds from the selection rows."""
    trained, train = training.method, planned.data.splits["train"]
    assert isinstance(trained, AdapterMethod)
    logits, classes = training.logits(), training.classes
    thresholds = None
    if trained.spec.multi_label and "selection" in logits:
        thresholds = choose_thresholds(logits["selection"], classes["selection"])
    method = trained.folded()
    metrics = measure_splits(method.objective, logits, classes, thresholds=thresholds)
    del metrics["selection"]
    settings = replace(planned.settings, data_name=planned.cell.task)
    update = {
        "thresholds": thresholds,
        "provenance": provenance_of(settings, train, metrics),
    }
    path.parent.mkdir(exist_ok=True)
    save_adapter(path, method.adapter(method.spec.model_copy(update=update)))


def _load_initial(training: Training, path: Path) -> None:
    """Replace the initial weights by the trained tensors of another cell."""
    tensors = load_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in training.method.tensors.items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise DataError("tensors of another method, design or label count", source=path)
    with torch.no_grad():
        training.method.restore(tensors)


def _report(method: str, training: Training) -> RunReport:
    state, classes = training.loop.checkpoint, training.classes
    objective, logits = training.method.objective, training.logits()
    thresholds = None
    if "selection" in logits and classes["selection"].dim() == 2:
        thresholds = choose_thresholds(logits["selection"], classes["selection"])
    return RunReport(
        method=method,
        seed=training.recipe.seed,
        metrics=measure_splits(objective, logits, classes, thresholds=thresholds),
        majority=majority(
            objective,
            classes["train"],
            {name: classes[name] for name in logits},
            labels=len(training.labels),
        ),
        trainable_parameters=training.method.size,
        seconds=state.seconds,
        seconds_per_epoch=state.seconds / len(state.history),
        peak_memory=peak_memory(training.method.backbone.device),
        epochs=tuple(state.history),
        best_epoch=state.best_epoch,
        learning_rate=training.recipe.learning_rate,
        answers={
            name: packed(objective.predict(split_logits, thresholds=thresholds).cpu())
            for name, split_logits in logits.items()
            if name != "selection"
        },
    )
