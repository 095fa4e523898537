"""Several worker processes and the cells that wait for them. Knows no method and no table.

A worker that dies fails its own cell and is replaced; so is one whose cell failed, for nobody
knows what it left on its device. `concurrent.futures` would give up all cells at one death.
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
from transformers.utils import logging

from adapters.backbone.loading import resolve_device
from adapters.errors import AdapterError
from train.errors import ResumeError, TrainingError
from train.experiments.cells import (
    Backbones,
    Cell,
    Outcome,
    Plan,
    RunReport,
    cell_state_path,
    run,
    write_outcome,
)
from train.experiments.display import Display
from train.loop.progress import EpochReport, Progress

# --- merged from train.experiments.messages


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


# --- merged from train.experiments.worker

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


class _PipeProgress(Progress):
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


# --- merged from train.experiments.waiting


class Waiting:
    """Plans that nobody runs yet: seed by seed, so that what is stopped leaves whole tables of some
    seeds, and within one the longest first: a long one at the end would run alone."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        seeds = list(dict.fromkeys(plan.cell.seed for plan in plans))
        self.plans = sorted(plans, key=lambda plan: (seeds.index(plan.cell.seed), -plan.cost))
        self._unfinished = {plan.cell for plan in plans}

    def first(self) -> Plan | None:
        """The next one that can be run: one that starts from no unfinished cell."""
        return next((plan for plan in self.plans if plan.after not in self._unfinished), None)

    def take(self, plan: Plan) -> None:
        """Somebody runs it now."""
        self.plans.remove(plan)

    def ended(self, outcome: Outcome) -> list[Plan]:
        """A cell is over; takes and returns the plans that can never be run now."""
        self._unfinished.remove(outcome.cell)
        if outcome.failure is None:
            return []
        lost = [plan for plan in self.plans if plan.after == outcome.cell]
        for plan in lost:
            self.take(plan)
        return lost


# --- merged from train.experiments.pool

REFRESH_SECONDS = 0.25
# Enough to write the state of a large backbone's fine-tuning.
SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Places:
    """Where cells run. devices: dealt round robin. threads: of torch, in every worker."""

    devices: tuple[str, ...]
    jobs: int
    threads: int


def run_plans(
    plans: Sequence[Plan],
    places: Places,
    *,
    cells: Path,
    display: Display,
    ended: Callable[[Outcome], None],
) -> None:
    """Run all plans, the longest first; returns when each has an outcome in the folder `cells`.

    Args:
        ended: is told of every outcome once it is written.

    Raises:
        KeyboardInterrupt: as soon as every worker has saved where it stands; at a second one, now.
    """
    waiting = Waiting(plans)
    pool = _Pool(places, cells)

    def over(outcome: Outcome) -> None:
        display.ended(outcome)
        ended(outcome)
        for plan in waiting.ended(outcome):
            failure = f"{outcome.cell.title}, which it starts from, failed"
            orphan = Outcome(plan.cell, None, failure, device=outcome.device)
            write_outcome(cells, orphan)
            over(orphan)

    try:
        while waiting.plans or pool.busy:
            while (plan := waiting.first()) is not None and (worker := pool.idle()) is not None:
                waiting.take(plan)
                display.started(plan.cell, worker.device)
                worker.start(plan)
            for worker, message in pool.messages():
                assert worker.plan is not None, "only a busy worker is listened to"
                match message:
                    case Ready():
                        pass
                    case Outcome():
                        pool.release(worker, failed=message.failure is not None)
                        over(message)
                    case _:
                        _show(display, worker.plan.cell, message)
            display.tick()
    except KeyboardInterrupt:
        display.note("interrupted: saving what runs; once more to lose it")
        pool.interrupt()
        raise
    finally:
        pool.close()


def _show(display: Display, cell: Cell, message: News) -> None:
    match message:
        case Noted(text):
            display.note(f"{cell.title}: {text}")
        case Moved(stage, share):
            display.moved(cell, stage, share)
        case EpochEnded(report):
            display.epoch_done(cell, report)


class _Worker:
    """One process and its pipe. plan: what it runs now."""

    def __init__(self, *, device: str, threads: int, cells: Path) -> None:
        self.device = device
        self.plan: Plan | None = None
        self._ready = self._heard = False
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=serve,
            args=(theirs,),
            kwargs={"device": device, "threads": threads, "cells": str(cells)},
            daemon=True,
        )
        with _interrupts_held_back():
            self.process.start()
        # Its death closes the last writing end: reading then ends instead of waiting for ever.
        theirs.close()

    def start(self, plan: Plan) -> None:
        """Give it a plan; one that still imports gets to see it afterwards.

        A plan's rows do not fit into the pipe: sending them would wait for the imports, and so
        would every worker that is to be started next.
        """
        self.plan, self._heard = plan, False
        if self._ready:
            self._send(plan)

    def receive(self) -> Message | None:
        """The next message; None where there will be none any more."""
        try:
            message: Message = self.pipe.recv()
        except (EOFError, OSError):
            return None
        if isinstance(message, Ready):
            self._ready = True
            if self.plan is not None:
                self._send(self.plan)
        else:
            self._heard = True
        return message

    def _send(self, plan: Plan) -> None:
        # One that is dead already is found so when it is listened to.
        with suppress(BrokenPipeError):
            self.pipe.send(plan)

    def death(self) -> str:
        """Why it is no more, for people."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"its process ended with code {code}"
        reason = "; the system may have been out of memory" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{reason}"

    def interrupt(self) -> None:
        """Make it save its plan's state and end; at once where there is nothing to save yet."""
        if not self._heard:
            self.process.kill()
            return
        assert self.process.pid is not None, "it was started"
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


class _Pool:
    """At most `places.jobs` workers; each is started when there is something for it to do."""

    def __init__(self, places: Places, cells: Path) -> None:
        self._places = places
        self._cells = cells
        self._workers: list[_Worker | None] = [None] * places.jobs

    @property
    def busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker and worker.plan]

    def idle(self) -> _Worker | None:
        """A worker without a plan, started if need be; None where all are busy."""
        for worker in self._workers:
            if worker is not None and worker.plan is None:
                return worker
        if None not in self._workers:
            return None
        seat = self._workers.index(None)
        device = self._places.devices[seat % len(self._places.devices)]
        worker = _Worker(device=device, threads=self._places.threads, cells=self._cells)
        self._workers[seat] = worker
        return worker

    def messages(self) -> Iterator[tuple[_Worker, Message]]:
        """What busy workers said meanwhile; a dead one's last word is a failed outcome."""
        busy = self.busy
        ready = connection.wait([worker.pipe for worker in busy], timeout=REFRESH_SECONDS)
        for worker in busy:
            if worker.pipe not in ready:
                continue
            message = worker.receive()
            if message is None:
                assert worker.plan is not None, "only busy workers are waited for"
                message = Outcome(worker.plan.cell, None, worker.death(), device=worker.device)
                write_outcome(self._cells, message)
            yield worker, message

    def release(self, worker: _Worker, *, failed: bool) -> None:
        """Its plan is over."""
        worker.plan = None
        if failed:
            self._workers[self._workers.index(worker)] = None
            worker.close()

    def interrupt(self) -> None:
        """Make busy workers save their state and end."""
        busy = self.busy
        for worker in busy:
            worker.interrupt()
        end = time.monotonic() + SAVE_SECONDS
        for worker in busy:
            while worker.process.is_alive() and time.monotonic() < end:
                # What it still has to say would fill the pipe and hold it up.
                if worker.pipe.poll(REFRESH_SECONDS) and worker.receive() is None:
                    worker.process.join(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._workers:
            if worker is not None:
                worker.close()
        self._workers = [None] * self._places.jobs


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A new process inherits the mask: a Ctrl-C during its first imports does not reach it."""
    # Started along with the first process otherwise, it would lift the mask.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
