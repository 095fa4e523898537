"""A process that runs cells one after another, told by a pipe. Knows no other worker.

It writes a finished cell itself: the death of its parent loses nothing that was finished.
"""

import gc
import os
import signal
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers.utils import logging

from adapters.errors import AdapterError
from adapters.loading import resolve_device
from train.errors import ResumeError, TrainingError
from train.experiments.cells import Plan
from train.experiments.messages import EpochEnded, Moved, News, Noted, Ready
from train.experiments.store import Outcome, cell_state_path, write_outcome
from train.progress import Progress, SilentProgress
from train.report import EpochReport
from train.runs import Backbones, RunReport, run

MOVE_INTERVAL = 0.5


def serve(pipe: Connection, *, device: str, threads: int, cells: str) -> None:
    """Run plans that come through `pipe`, each answered by its `Outcome`, until it is closed.

    Ctrl-C on a terminal reaches the parent alone, which passes it on.
    """
    os.setpgrp()
    progress = _PipeProgress(pipe)
    signal.signal(signal.SIGINT, lambda *_: progress.interrupt())
    # The parent held it back so far.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    # What it says of a backbone's files would be said by every worker, across the display.
    logging.set_verbosity_error()
    backbones = Backbones()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        pipe.send(Ready())
        while True:
            plan = pipe.recv()
            outcome = _outcome(plan, progress, backbones, device=device, cells=Path(cells))
            write_outcome(Path(cells), outcome)
            pipe.send(outcome)
            # What it keeps for itself of a GPU, the other workers there cannot have.
            gc.collect()
            torch.cuda.empty_cache()


def _end_with_parent() -> None:
    """An orphan would go on beside the workers of the next start."""
    parent = parent_process()
    assert parent is not None, "serve runs in a process of its own"
    connection.wait([parent.sentinel])
    os._exit(1)


def _outcome(
    plan: Plan, progress: Progress, backbones: Backbones, *, device: str, cells: Path
) -> Outcome:
    """Run a plan; whatever goes wrong in it is its outcome."""
    state, trace = cell_state_path(cells, plan.cell), None
    try:
        report = _run(plan, progress, backbones, device=device, state=state)
        return Outcome(plan.cell, report, None, device=_described(device))
    except (TrainingError, AdapterError) as error:
        failure = str(error) or type(error).__name__
    except (MemoryError, torch.OutOfMemoryError) as error:
        failure = f"out of memory: {error}"
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
    line = " ".join(failure.split())
    return Outcome(plan.cell, None, line, device=_described(device), trace=trace)


def _run(
    plan: Plan, progress: Progress, backbones: Backbones, *, device: str, state: Path
) -> RunReport:
    settings = replace(plan.settings, device=device)

    def once() -> RunReport:
        return run(
            plan.cell.method,
            plan.rows.sets,
            settings,
            metric=plan.rows.metric,
            state=state,
            progress=progress,
            backbones=backbones,
            initial=plan.initial,
            weights=plan.weights,
        )

    try:
        return once()
    except ResumeError as error:
        progress.note(f"{plan.cell.title}: {error}; starting it over")
        state.unlink(missing_ok=True)
        return once()


def _described(device: str) -> str:
    target = resolve_device(device)
    return torch.cuda.get_device_name(target) if target.type == "cuda" else target.type


class _PipeProgress(SilentProgress):
    """Tells the parent, of steps twice a second.

    An interruption is raised here and nowhere else: between steps, where a run can save its state,
    never amid an update or a file.
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

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:  # noqa: ARG002  # the protocol's
        self._stage, self._texts, self._done = stage, texts, 0
        self._move()

    def advance(
        self,
        texts: int,
        *,
        loss: float | None = None,  # noqa: ARG002  # the protocol's
        accuracy: float | None = None,  # noqa: ARG002  # the protocol's
    ) -> None:
        self._done += texts
        if self._interrupted or time.monotonic() - self._last >= MOVE_INTERVAL:
            self._move()

    def epoch_done(self, report: EpochReport) -> None:
        self._send(EpochEnded(report))

    def _move(self) -> None:
        self._last = time.monotonic()
        self._send(Moved(self._stage, self._done / max(self._texts, 1)))

    def _send(self, news: News) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        try:
            self._pipe.send(news)
        except OSError:
            # Nobody is left who would want the result.
            raise KeyboardInterrupt from None
