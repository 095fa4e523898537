"""`python -m chaos.replicas`: break replicas and the store that they share, while clients of all of
them change adapters and predict. `make chaos-replicas` runs it.

Each replica is a service of its own. Its link to the store is broken alone: on S3 (moto's server) a
TCP proxy in between, in a folder the fault points of `adapters.shared.objects`. Every replica must
have a linearizable history: all changes, by whichever replica, and this replica's own answers. So
what was acknowledged anywhere is seen everywhere, and no replica goes back. Two replicas may switch
at different moments while a change is on its way: only when it has returned is it everywhere.
"""

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from chaos.answers import Answers
from chaos.changes import Changes
from chaos.history import Undecided, check
from chaos.http import Connection, Cut, NotConnected, Silent
from chaos.load import Load
from chaos.service import Service
from tests.support.s3_server import BUCKET, environment, s3_server
from tests.support.tcp_proxy import Proxy, proxy_to

Kind: TypeAlias = Literal["folder", "s3"]
Trouble: TypeAlias = Literal["slow", "fails", "lost"]

FOLLOW_SECONDS = 0.25
ROLLOUT_SECONDS = 6.0
LOST_SECONDS = 10.0
SLOW_SECONDS = 0.3
# After a fault, for as long as everything must work again.
_CALM_SECONDS = 4.0
_RECOVERY_SECONDS = 40.0
_STEADY = "steady"
_NAMES = ("alpha", "beta")
_POINTS = ("create", "put", "get", "list", "stat", "delete")


@dataclass(slots=True)
class Replica:
    """A service and its link to the store. proxy: None in a folder."""

    service: Service
    load: Load
    proxy: Proxy | None

    def trouble(self, trouble: Trouble) -> None:
        """From now on every call to the store is slow, fails at once, or gets no answer."""
        if self.proxy is not None:
            self.proxy.delay = SLOW_SECONDS if trouble == "slow" else 0.0
            modes: dict[Trouble, Literal["pass", "refuse", "hold"]]
            modes = {"slow": "pass", "fails": "refuse", "lost": "hold"}
            self.proxy.mode = modes[trouble]
            return
        action = {"slow": f"sleep:{SLOW_SECONDS}", "fails": "EIO", "lost": f"sleep:{LOST_SECONDS}"}
        self.service.inject(*(f"shared.{point} {action[trouble]}" for point in _POINTS))

    def mend(self) -> None:
        if self.proxy is not None:
            self.proxy.delay, self.proxy.mode = 0.0, "pass"
        self.service.heal()


@dataclass(slots=True)
class Lab:
    replicas: list[Replica]
    answers: Answers
    chance: random.Random


@dataclass(slots=True)
class Row:
    """What one fault did. Seconds are the longest without a right answer, on replicas that were hit
    and on others, and without an accepted change anywhere."""

    fault: str
    store: Kind
    replicas: int
    outcomes: Counter[str] = field(default_factory=Counter)
    hit: float = 0.0
    others: float | None = None
    changes: float = 0.0
    accepted: int = 0
    unknown: int = 0
    checked: int = 0
    violations: int = 0
    complaints: list[str] = field(default_factory=list)


Fault: TypeAlias = Callable[[Lab], Awaitable[Sequence[Replica]]]


async def _kill(lab: Lab) -> Sequence[Replica]:
    """kill -9 of one replica, and a new start three seconds later."""
    victim = lab.chance.choice(lab.replicas)
    await victim.service.kill()
    await asyncio.sleep(3.0)
    await victim.service.start()
    return [victim]


def _stop(seconds: float) -> Fault:
    async def stop(lab: Lab) -> Sequence[Replica]:
        victim = lab.chance.choice(lab.replicas)
        os.kill(victim.service.pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        os.kill(victim.service.pid, signal.SIGCONT)
        return [victim]

    return stop


def _store(trouble: Trouble, *, one: bool) -> Fault:
    async def broken(lab: Lab) -> Sequence[Replica]:
        victims = [lab.chance.choice(lab.replicas)] if one else lab.replicas
        for each in victims:
            each.trouble(trouble)
        await asyncio.sleep(LOST_SECONDS)
        for each in victims:
            each.mend()
        return victims

    return broken


FAULTS: tuple[tuple[str, Fault], ...] = (
    ("kill -9 of one, a start after 3 s", _kill),
    ("SIGSTOP of one for 5 s", _stop(5.0)),
    (f"every call is {SLOW_SECONDS:g} s slower for 10 s", _store("slow", one=False)),
    ("one loses its connection for 10 s", _store("lost", one=True)),
    ("the store fails for all for 10 s", _store("fails", one=False)),
    ("all lose their connection for 10 s", _store("lost", one=False)),
)


async def run(arguments: Namespace) -> list[Row]:
    """The rows of all faults, for every store and number of replicas."""
    seed = arguments.seed or time.time_ns() % 10**6
    backbone = load_backbone(arguments.backbone, device="cpu")
    answers = Answers(backbone, dtype="float32", seed=seed, texts=8)
    rows = []
    for store in arguments.stores:
        for count in arguments.replicas:
            async with _lab(arguments, store, count, answers, seed) as lab:
                for name, fault in FAULTS:
                    if arguments.only in name:
                        rows.append(await _injected(lab, name, fault, store))
                        sys.stderr.write(f"chaos: {_line(rows[-1])}\n")
                        for complaint in rows[-1].complaints:
                            sys.stderr.write(f"chaos:   {complaint}\n")
    return rows


async def _injected(lab: Lab, name: str, fault: Fault, store: Kind) -> Row:
    row = Row(name, store, len(lab.replicas))
    tag = lab.chance.randrange(10**6)
    names = [f"{each}-{tag}" for each in _NAMES]
    ports = [each.service.port for each in lab.replicas]
    since = [len(each.load.requests) for each in lab.replicas]
    changes = Changes(
        "127.0.0.1",
        ports,
        lab.answers,
        names,
        writers=2,
        readers=len(ports),
        seed=tag,
        kinds=("put", "rollback", "delete"),
    )
    async with changes:
        began = time.monotonic()
        await asyncio.sleep(lab.chance.uniform(1.5, 2.5))
        victims = await fault(lab)
        if not await _recovered(lab):
            row.complaints.append(f"not recovered after {_RECOVERY_SECONDS:g} s")
        await asyncio.sleep(_CALM_SECONDS)
        ended = time.monotonic()
    await changes.read_all()
    for each, first in zip(lab.replicas, since, strict=True):
        requests = each.load.requests[first:]
        row.outcomes.update(request.outcome for request in requests)
        row.complaints += [
            f"{request.outcome}: {request.detail}"
            for request in requests
            if request.outcome in ("wrong", "lost")
        ]
        right = [request.ended for request in requests if request.outcome == "right"]
        gap = longest(right, began, ended)
        if each in victims:
            row.hit = max(row.hit, gap)
        else:
            row.others = max(row.others or 0.0, gap)
    accepted = [
        operation.ended
        for operation in changes.history
        if operation.kind != "read" and operation.known
    ]
    row.changes = longest(accepted, began, ended)
    row.accepted, row.unknown = len(accepted), changes.unknown
    row.complaints += changes.faults
    await _judge(row, changes, ports)
    return row


async def _judge(row: Row, changes: Changes, ports: Sequence[int]) -> None:
    """Look for an order of all changes and each replica's answers."""
    for port in ports:
        history = changes.seen_at(port)
        row.checked += len(history)
        try:
            # In a thread: the load goes on, and would time out while this loop is blocked.
            violations = await asyncio.to_thread(check, history)
        except Undecided as error:
            row.complaints.append(f"the history could not be decided: {error}")
            continue
        row.violations += len(violations)
        row.complaints += map(str, violations)


async def _recovered(lab: Lab) -> bool:
    """Whether every replica answers, and says that it is ready."""
    until = time.monotonic() + _RECOVERY_SECONDS
    for each in lab.replicas:
        connection = Connection("127.0.0.1", each.service.port)
        while True:
            with suppress(NotConnected, Cut, Silent):
                if (await connection.ask("GET", "/readyz", seconds=5)).status == 200:
                    break
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.1)
        connection.close()
    return True


def longest(moments: Sequence[float], began: float, ended: float) -> float:
    """The longest time in a span without one of these moments."""
    marks = [began, *sorted(each for each in moments if began < each < ended), ended]
    return max(after - before for before, after in pairwise(marks))


@asynccontextmanager
async def _lab(
    arguments: Namespace, store: Kind, count: int, answers: Answers, seed: int
) -> AsyncIterator[Lab]:
    with _folder() as folder, ExitStack() as stack:
        endpoint = stack.enter_context(s3_server()) if store == "s3" else None
        replicas: list[Replica] = []
        async with AsyncExitStack() as running:
            try:
                for number in range(count):
                    proxy = stack.enter_context(proxy_to(endpoint)) if endpoint else None
                    shared = f"s3://{BUCKET}/chaos" if endpoint else str(folder / "shared")
                    service = Service(
                        folder / str(number),
                        workers=arguments.workers,
                        environment={
                            "IDSPAM_BACKBONE": str(arguments.backbone),
                            "IDSPAM_DTYPE": "float32",
                            "IDSPAM_ADAPTER_STORE": shared,
                            "IDSPAM_REPLICA": f"replica-{number}",
                            "IDSPAM_FOLLOW_SECONDS": str(FOLLOW_SECONDS),
                            "IDSPAM_LEASE_SECONDS": str(arguments.lease),
                            "IDSPAM_ROLLOUT_SECONDS": str(ROLLOUT_SECONDS),
                            "IDSPAM_STALE": arguments.stale,
                            "IDSPAM_DRAIN_SECONDS": "2",
                            "OMP_NUM_THREADS": "1",
                            **(environment(proxy.url) if proxy else {}),
                        },
                    )
                    running.push_async_callback(_end, service)
                    await service.start()
                    load = Load(
                        "127.0.0.1", service.port, answers, [_STEADY], clients=1, seed=seed + number
                    )
                    replicas.append(Replica(service, load, proxy))
                await _publish(replicas[0], answers)
                for each in replicas:
                    await running.enter_async_context(each.load)
                yield Lab(replicas, answers, random.Random(seed))
            finally:
                for each in replicas:
                    each.mend()


async def _end(service: Service) -> None:
    if service.running:
        await service.kill()


async def _publish(replica: Replica, answers: Answers) -> None:
    version = answers.version()
    answers.learn(version)
    connection = Connection("127.0.0.1", replica.service.port)
    until = time.monotonic() + _RECOVERY_SECONDS
    while True:
        # Replicas that have just started on few cores may be slow enough to lose their lease.
        answer = await connection.ask(
            "PUT",
            f"/v1/adapters/{_STEADY}",
            version.file,
            seconds=30,
            kind="application/octet-stream",
        )
        if answer.status < 300:
            break
        assert time.monotonic() < until, answer
        await asyncio.sleep(0.5)
    connection.close()


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="idspam-replicas-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_HEAD = (
    "| fault | store | replicas | right | refused | cut or not connected | wrong or lost "
    "| longest without an answer: hit, others (s) | changes made | without an answer "
    "| longest without a change (s) | operations checked | violations | other complaints |"
)


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    return "\n".join([_HEAD, "|---" * 14 + "|", *map(_line, rows)])


def _line(row: Row) -> str:
    count = row.outcomes
    others = "-" if row.others is None else f"{row.others:.1f}"
    cells = [
        row.fault,
        row.store,
        row.replicas,
        count["right"],
        count["refused"],
        count["cut"] + count["unconnected"],
        count["wrong"] + count["lost"],
        f"{row.hit:.1f}, {others}",
        row.accepted,
        row.unknown,
        f"{row.changes:.1f}",
        row.checked,
        row.violations,
        len(row.complaints) - row.violations,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _arguments() -> Namespace:
    parser = ArgumentParser(prog="python -m chaos.replicas", description=__doc__)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="default: %(default)s")
    parser.add_argument("--workers", type=int, choices=(0, 2), default=0, help="of each replica")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stores", nargs="+", choices=("folder", "s3"), default=["folder", "s3"])
    parser.add_argument(
        "--stale",
        choices=("refuse", "serve"),
        default="refuse",
        help="serve: answer without a lease, which the checker must find out",
    )
    parser.add_argument("--lease", type=float, default=3.0, help="seconds; default: %(default)s")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: by the clock")
    return parser.parse_args()


def main() -> int:
    """0 if nothing was wrong or lost, and every history has an order."""
    began = time.monotonic()
    rows = asyncio.run(run(_arguments()))
    sys.stdout.write(f"{table(rows)}\n\n{len(rows)} rows in {time.monotonic() - began:.0f} s\n")
    if not rows:
        sys.stderr.write("chaos: no fault has this name\n")
        return 2
    return 1 if any(row.complaints for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
