"""`python -m chaos`: inject every fault, print the table, and fail if anything was wrong or lost.

`make chaos` runs it with the default backbone in under eight minutes on two cores.
"""

import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from chaos import clock
from chaos.answers import Answers
from chaos.faults import FAULTS, CannotInject, Lab, Named, Row
from chaos.load import Load
from chaos.report import passed, table
from chaos.service import Service, ServiceFailed

_NAMES = ("alpha", "beta", "gamma")
_CLIENTS = 6
_TEXTS = 40
_DRAIN_SECONDS = "5"
_STORE_BYTES = "64m"


def _arguments() -> Namespace:
    parser = ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workers", type=int, nargs="+", choices=(0, 2), default=[2, 0])
    parser.add_argument(
        "--devices", type=int, choices=(1, 2, 3), default=1, help="engines on the CPU; default: 1"
    )
    parser.add_argument("--quick", action="store_true", help="once each, and not the slow ones")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: by the clock")
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    if arguments.devices > 1:
        # Several devices need workers.
        arguments.workers = [2]
    return arguments


async def run(arguments: Namespace) -> list[Row]:
    """The rows of all faults in all modes."""
    seed = arguments.seed or time.time_ns() % 10**6
    backbone = load_backbone(arguments.backbone, device="cpu")
    answers = Answers(backbone, dtype=arguments.dtype, seed=seed, texts=_TEXTS)
    rows: list[Row] = []
    for workers in arguments.workers:
        faults = [
            fault
            for fault in FAULTS
            if workers in fault.workers
            and fault.devices <= arguments.devices
            and arguments.only in fault.name
            and (workers in fault.quick or not arguments.quick)
        ]
        if faults:
            with _store_folder() as folder:
                environment = {"IDSPAM_DRAIN_SECONDS": _DRAIN_SECONDS}
                async with _lab(arguments, folder, workers, answers, seed, environment) as lab:
                    for fault in faults:
                        rows.append(await _injected(fault, lab))
        if arguments.only in clock.NAME and not (arguments.quick and workers == 0):
            rows.append(await _clock(arguments, workers, answers, seed))
    return rows


async def _clock(arguments: Namespace, workers: int, answers: Answers, seed: int) -> Row:
    """In a service of its own, because its clock is a library's."""
    row = Row(clock.NAME, workers)
    library = clock.library()
    if library is None:
        row.skipped, row.note = True, "not run: libfaketime is not installed"
        return row
    with _store_folder() as folder:
        environment = clock.environment(library, folder / "clock")
        lab_of_clock = _lab(
            arguments, folder, workers, answers, seed, environment, starts=clock.STARTS
        )
        async with lab_of_clock as lab:
            fault = Named(clock.NAME, clock.steps(folder / "clock"))
            return await _injected(fault, lab)


async def _injected(fault: Named, lab: Lab) -> Row:
    lab.row = row = Row(fault.name, lab.service.workers)
    since = len(lab.load.requests)
    try:
        await fault.inject(lab)
    except CannotInject as error:
        row.skipped, row.note = True, f"not run: {error}"
    finally:
        lab.service.heal()
    requests = lab.load.requests[since:]
    row.counts = dict(lab.load.counts(since))
    row.refusals = dict(Counter(item.detail for item in requests if item.outcome == "refused"))
    for request in requests:
        if request.outcome in ("wrong", "lost") or (request.outcome == "cut" and not fault.cuts):
            row.complaints.append(f"{request.outcome}: {request.detail}")
    sys.stderr.write(f"chaos: {table([row]).splitlines()[2]}\n")
    if row.refusals:
        sys.stderr.write(f"chaos:   refused: {row.refusals}\n")
    for complaint in row.complaints[:5]:
        sys.stderr.write(f"chaos:   {complaint}\n")
    return row


@asynccontextmanager
async def _lab(
    arguments: Namespace,
    folder: Path,
    workers: int,
    answers: Answers,
    seed: int,
    environment: dict[str, str],
    *,
    starts: int = 1,
) -> AsyncIterator[Lab]:
    """A service under load. starts: how often it is tried to start it."""
    environment = {
        "IDSPAM_BACKBONE": str(arguments.backbone),
        "IDSPAM_DTYPE": arguments.dtype,
        **environment,
    }
    # A folder below the mount, so that it can be removed.
    store = folder / "disk" / "store"
    service = Service(
        folder,
        workers=workers,
        environment=environment,
        store=store,
        devices=arguments.devices,
    )
    for left in reversed(range(starts)):
        try:
            await service.start()
            break
        except ServiceFailed:
            if not left:
                raise
    try:
        names = list(_NAMES)
        load = Load("127.0.0.1", service.port, answers, names, clients=_CLIENTS, seed=seed)
        scale = 0.2 if arguments.quick else 1.0
        lab = Lab(service, answers, load, names, {}, random.Random(seed), scale)
        for name in names:
            lab.versions[name] = answers.version()
            answers.learn(lab.versions[name])
            await lab.put_until_accepted(name, lab.versions[name])
        async with load:
            yield lab
    finally:
        if service.running:
            await service.kill()


@contextmanager
def _store_folder() -> Iterator[Path]:
    """A folder for a service, with a small disk for its store where one can be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="idspam-chaos-"))
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_STORE_BYTES}", "tmpfs", str(disk)]
    mounted = shutil.which("mount") is not None and (
        subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """0 if nothing was wrong or lost and the service always recovered."""
    arguments = _arguments()
    began = time.monotonic()
    rows = asyncio.run(run(arguments))
    sys.stdout.write(f"{table(rows)}\n\n{len(rows)} rows in {time.monotonic() - began:.0f} s\n")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if not rows:
        sys.stderr.write("chaos: no fault has this name\n")
        return 2
    return 0 if passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
