"""Several worker processes and the cells that wait for them. Knows no method and no table.

A worker that dies fails its own cell and is replaced; so is one whose cell failed, for nobody
knows what it left on its device. `concurrent.futures` would give up all cells at one death.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

from train.experiments.cells import Cell, Plan
from train.experiments.display import Display
from train.experiments.messages import EpochEnded, Message, Moved, News, Noted, Ready
from train.experiments.store import Outcome, write_outcome
from train.experiments.waiting import Waiting
from train.experiments.worker import serve

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
