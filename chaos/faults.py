"""Every fault: how it is injected, and when the service has recovered from it."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chaos.answers import Answers, Version
from chaos.changes import Changes
from chaos.history import Undecided, check
from chaos.http import Answer, Connection, Cut, NotConnected, Silent
from chaos.load import Load, Outcome
from chaos.service import Service

# A fault whose recovery takes longer than this has not been recovered from.
RECOVERY_SECONDS = 60.0
# So many right answers in a row are a recovery.
_RIGHT = 8


@dataclass(slots=True)
class Row:
    """What a fault did. in_flight: requests at the moments of injection. recovery: seconds, one for
    each time; 0 where no request failed. complaints: what must not be."""

    fault: str
    workers: int
    times: int = 0
    in_flight: int = 0
    counts: dict[Outcome, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    recovery: list[float] = field(default_factory=list)
    note: str = ""
    complaints: list[str] = field(default_factory=list)
    skipped: bool = False

    def count(self, outcome: Outcome) -> int:
        return self.counts.get(outcome, 0)


@dataclass(slots=True)
class Lab:
    """A running service under load. spare: a name that only faults ask for. scale: how many times
    a fault is injected, and for how long, relative to the full run."""

    service: Service
    answers: Answers
    load: Load
    names: list[str]
    versions: dict[str, Version]
    chance: random.Random
    scale: float
    row: Row = field(default_factory=lambda: Row("", 0))

    def times(self, full: int) -> int:
        return max(1, round(full * self.scale))

    async def pause(self, most: float) -> None:
        """A random moment."""
        await asyncio.sleep(self.chance.uniform(0.1, most))

    async def shot(
        self, inject: Callable[[], Awaitable[object]], *, ends: Callable[[], None] | None = None
    ) -> None:
        """Inject once, and wait until the service answers again.

        Args:
            inject: returns when the fault is there, or over.
            ends: ends a fault that does not end by itself; recovery counts from then.
        """
        since, began = len(self.load.requests), time.monotonic()
        self.row.times += 1
        self.row.in_flight += self.load.in_flight
        await inject()
        if ends is not None:
            ends()
            began = time.monotonic()
        if not await self.load.answered(
            after=time.monotonic(), times=_RIGHT, seconds=RECOVERY_SECONDS
        ):
            self.row.complaints.append(f"not recovered after {RECOVERY_SECONDS:g} s")
        self.row.recovery.append(self.load.seconds_down(since, began))

    async def put(self, name: str, version: Version, seconds: float = 20.0) -> Answer:
        connection = self.connection()
        try:
            return await connection.ask(
                "PUT",
                f"/v1/adapters/{name}",
                version.file,
                seconds=seconds,
                kind="application/octet-stream",
            )
        finally:
            connection.close()

    async def put_until_accepted(self, name: str, version: Version) -> None:
        until = time.monotonic() + RECOVERY_SECONDS
        last: Answer | None = None
        while time.monotonic() < until:
            with suppress(NotConnected, Cut, Silent):
                last = await self.put(name, version)
                if last.status < 300:
                    return
            await asyncio.sleep(0.1)
        self.row.complaints.append(f"no upload was accepted any more: {str(last)[:200]}")

    def connection(self) -> Connection:
        return Connection("127.0.0.1", self.service.port)


Fault = Callable[[Lab], Awaitable[None]]


class CannotInject(Exception):
    """The fault could not be injected; the message says why."""


def _kill(name: str, full: int) -> Fault:
    async def fault(lab: Lab) -> None:
        for turn in range(lab.times(full)):
            await lab.pause(1.0)
            victim = f"worker-{turn % 2}" if name == "worker" else name

            async def inject(victim: str = victim) -> None:
                os.kill(lab.service.children()[victim], signal.SIGKILL)

            await lab.shot(inject)
            await _replaced(lab)

    return fault


def _stop(name: str, full: int, *, seconds: float | None) -> Fault:
    """seconds: until SIGCONT; None: until the supervisor has replaced it."""

    async def fault(lab: Lab) -> None:
        for _ in range(lab.times(full)):
            await lab.pause(1.0)
            pid = lab.service.processes()[name]

            async def inject(pid: int = pid) -> None:
                os.kill(pid, signal.SIGSTOP)
                if seconds is None:
                    await _gone(lab, name, pid)
                else:
                    await asyncio.sleep(seconds)
                    os.kill(pid, signal.SIGCONT)

            await lab.shot(inject)
            if seconds is None:
                await _replaced(lab)
            elif lab.service.processes().get(name) != pid:
                lab.row.complaints.append(f"{name} was replaced after {seconds:g} s")

    return fault


async def _gone(lab: Lab, name: str, pid: int) -> None:
    until = time.monotonic() + RECOVERY_SECONDS
    while lab.service.children().get(name) == pid and time.monotonic() < until:
        await asyncio.sleep(0.05)


async def _replaced(lab: Lab) -> None:
    """Return when the engine, the standby and every worker are there and ready."""
    until = time.monotonic() + RECOVERY_SECONDS
    ready: set[object] = set()
    # They stay open: a new connection goes to the worker that has the fewest.
    asking: list[Connection] = []
    try:
        while time.monotonic() < until:
            asking.append(connection := lab.connection())
            with suppress(NotConnected, Cut, Silent):
                answer = await connection.ask("GET", "/readyz", seconds=5)
                if answer.status == 200 and not answer.body["details"].get("devices_missing"):
                    ready.add(answer.body["details"].get("worker"))
            if (
                len(ready) == lab.service.workers
                and len(lab.service.children()) == lab.service.workers + lab.service.devices + 1
            ):
                lab.load.spread()
                return
            await asyncio.sleep(0.05)
    finally:
        for connection in asking:
            connection.close()
    there = f"workers {sorted(map(str, ready))} answered, {sorted(lab.service.children())} run"
    lab.row.complaints.append(f"a process was not replaced: {there}")


def _device(point: str) -> Fault:
    async def fault(lab: Lab) -> None:
        for _ in range(lab.times(3)):

            async def inject() -> None:
                lab.service.inject(f"{point} yes")
                await asyncio.sleep(0.5)

            await lab.pause(0.5)
            await lab.shot(inject, ends=lab.service.heal)

    return fault


async def _device_lost(lab: Lab) -> None:
    for _ in range(lab.times(2)):
        pid = lab.service.children()["engine"]

        async def inject(pid: int = pid) -> None:
            lab.service.inject("runner.device_lost yes")
            await _gone(lab, "engine", pid)
            lab.service.heal()

        await lab.pause(0.5)
        await lab.shot(inject)


async def _leave(lab: Lab) -> None:
    """Clients that are gone at some point: in the middle of the head, of the body, or while their
    request runs."""
    texts = list(range(min(16, len(lab.answers.texts))))
    content = json.dumps(lab.answers.body(lab.names[0], texts)).encode()
    head = (
        "POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    request = head.encode() + content

    async def leave() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", lab.service.port)
        part = lab.chance.choice((lab.chance.randrange(len(request)), len(request)))
        writer.write(request[:part])
        await asyncio.sleep(lab.chance.uniform(0, 0.05))
        writer.transport.abort()

    for _ in range(lab.times(3)):

        async def inject() -> None:
            await asyncio.gather(*(leave() for _ in range(100)))

        await lab.shot(inject)


async def _slow(lab: Lab) -> None:
    """Clients that send their request in small pieces over two seconds."""
    texts = [0, 2, 3]

    async def ask() -> None:
        content = json.dumps(lab.answers.body(lab.names[0], texts)).encode()
        request = (
            "POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        ).encode() + content
        reader, writer = await asyncio.open_connection("127.0.0.1", lab.service.port)
        size = -(-len(request) // 20)
        for start in range(0, len(request), size):
            writer.write(request[start : start + size])
            await writer.drain()
            await asyncio.sleep(0.1)
        answer = await reader.read()
        writer.close()
        if b" 200 " not in answer.split(b"\r\n")[0]:
            lab.row.complaints.append(f"a slow client got {answer[:200]!r}")

    for _ in range(lab.times(2)):

        async def inject() -> None:
            await asyncio.gather(*(ask() for _ in range(20)))

        await lab.shot(inject)


async def _flipped(lab: Lab) -> None:
    """One bit of the stored file of the current revision; then the engine reads it again."""
    name = lab.names[0]
    for _ in range(lab.times(2)):
        version = lab.versions[name] = lab.answers.version()
        await lab.put_until_accepted(name, version)
        path = lab.service.store / name / f"{version.revision}.safetensors"
        if not path.is_file():
            (path,) = (lab.service.store / name).rglob(f"*{version.revision}*")
        at = lab.chance.randrange(path.stat().st_size)
        data = bytearray(version.file)
        data[at] ^= 1 << lab.chance.randrange(8)

        async def inject(
            path: Path = path, data: bytes = bytes(data), version: Version = version
        ) -> None:
            path.chmod(0o644)
            path.write_bytes(data)
            connection = lab.connection()
            with suppress(Cut, Silent):
                answer = await connection.ask(
                    "GET", f"/v1/adapters/{name}/file", seconds=20, kind="text/plain"
                )
                if answer.status == 200:
                    lab.row.complaints.append("the damaged file was sent as good")
            connection.close()
            if lab.service.workers:
                os.kill(lab.service.children()["engine"], signal.SIGKILL)
            await asyncio.sleep(1.5)
            await lab.put_until_accepted(name, version)

        await lab.shot(inject)


def _store(break_it: Callable[[Lab], None], mend: Callable[[Lab], None]) -> Fault:
    async def fault(lab: Lab) -> None:
        mount = lab.service.store.parent
        if not os.path.ismount(mount):
            lab.row.skipped, lab.row.note = True, "not run: a tmpfs cannot be mounted here"
            return
        name = lab.names[-1]
        for _ in range(lab.times(2)):

            async def inject() -> None:
                break_it(lab)
                try:
                    answer = await lab.put(name, lab.answers.version())
                    if answer.status < 300 or answer.error is None or answer.error == "internal":
                        lab.row.complaints.append(f"an upload got {answer.status} {answer.body}")
                    else:
                        lab.row.note = f"uploads: {answer.status} {answer.error}"
                    await asyncio.sleep(0.5)
                finally:
                    mend(lab)
                for each in lab.names:
                    lab.versions[each] = lab.answers.version()
                    await lab.put_until_accepted(each, lab.versions[each])

            await lab.shot(inject)

    return fault


def _fill(lab: Lab) -> None:
    filler = lab.service.store.parent / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"x")


def _written(lab: Lab) -> list[str]:
    """What the service has open in its store."""
    found = []
    for pid in lab.service.processes().values():
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(link)
                if target.startswith(str(lab.service.store.parent)):
                    found.append(target)
    return found


def _remount(options: str) -> Callable[[Lab], None]:
    def remount(lab: Lab) -> None:
        command = ["mount", "-o", f"remount,{options}", str(lab.service.store.parent)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise CannotInject(f"{ended.stderr.strip()}; open: {_written(lab)}")

    return remount


async def _sigterm(lab: Lab) -> None:
    """SIGTERM while clients are stuck in the middle of a request, then a new start."""
    for _ in range(lab.times(2)):
        stuck = []
        for _ in range(5):
            stuck.append(await asyncio.open_connection("127.0.0.1", lab.service.port))
            stuck[-1][1].write(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")

        async def inject() -> None:
            seconds = await lab.service.terminate()
            lab.row.note = f"ended after {seconds:.1f} s with status 0"
            await lab.service.start()

        await lab.pause(0.5)
        await lab.shot(inject)
        for _, writer in stuck:
            writer.close()


async def _kill_all(lab: Lab) -> None:
    """kill -9 of all processes while adapters are uploaded, rolled back and deleted; what was
    acknowledged must be there after the start."""
    async with _changes(lab, writers=4, readers=2) as changes:
        for _ in range(lab.times(3)):
            await lab.pause(2.0)

            async def inject() -> None:
                began = time.monotonic()
                await lab.service.kill()
                await lab.service.start()
                changes.restarted(began, time.monotonic())

            await lab.shot(inject)
            await changes.read_all()
    await _judge(lab, changes)


async def _history(lab: Lab) -> None:
    """Concurrent changes and predictions, with kills of engine and workers if there are any."""
    seconds = 24.0 * lab.scale
    async with _changes(lab, writers=4, readers=4) as changes:
        until = time.monotonic() + seconds
        turn = 0
        while time.monotonic() < until:
            await lab.pause(min(4.0, seconds / 2))
            if not lab.service.workers:
                continue
            further = "engine-1" if lab.service.devices > 1 else "engine"
            victim = ("engine", "worker-0", further, "worker-1")[turn % 4]
            turn += 1

            async def inject(victim: str = victim) -> None:
                began = time.monotonic()
                os.kill(lab.service.children()[victim], signal.SIGKILL)
                if victim == "engine":
                    await lab.load.answered(after=began, times=1, seconds=RECOVERY_SECONDS)
                    changes.restarted(began, time.monotonic())

            await lab.shot(inject)
        await changes.read_all()
    if not lab.row.times:
        lab.row.times = 1
    await _judge(lab, changes)


def _changes(lab: Lab, *, writers: int, readers: int) -> Changes:
    names = [f"changed-{lab.row.workers}-{lab.chance.randrange(10**6)}-{n}" for n in range(4)]
    return Changes(
        "127.0.0.1",
        [lab.service.port],
        lab.answers,
        names,
        writers=writers,
        readers=readers,
        seed=lab.chance.randrange(10**6),
    )


async def _judge(lab: Lab, changes: Changes) -> None:
    lab.row.complaints += changes.faults
    try:
        # In a thread: the load goes on, and would time out while this loop is blocked.
        violations = await asyncio.to_thread(check, changes.history)
    except Undecided as error:
        lab.row.complaints.append(f"the history could not be decided: {error}: {_kept(changes)}")
        return
    if violations:
        lab.row.complaints += [*map(str, violations), f"the history: {_kept(changes)}"]
    lab.row.note = (
        f"{changes.answered} operations answered, {changes.unknown} changes without an answer, "
        f"{len(violations)} names without an order"
    )


def _kept(changes: Changes) -> Path:
    """Write a history down, to look at it later."""
    path = Path(tempfile.mkdtemp(prefix="idspam-history-")) / "history.json"
    path.write_text(json.dumps([asdict(operation) for operation in changes.history]))
    return path


@dataclass(frozen=True, slots=True)
class Named:
    """A fault in the table. workers: the modes in which it is injected. cuts: whether it ends
    processes that hold connections, so that these are cut. quick: the modes of the short run.
    devices: how many the service must have."""

    name: str
    inject: Fault
    workers: Sequence[int] = (0, 2)
    cuts: bool = False
    quick: Sequence[int] = (0, 2)
    devices: int = 1


def _mend_removed(lab: Lab) -> None:
    lab.service.store.mkdir(exist_ok=True)


FAULTS = (
    Named("kill -9 of the engine", _kill("engine", 6), (2,)),
    Named("kill -9 of a further engine", _kill("engine-1", 6), (2,), devices=2),
    Named("kill -9 of a worker", _kill("worker", 6), (2,), cuts=True),
    Named("kill -9 of the standby", _kill("standby", 2), (2,), quick=()),
    Named("SIGSTOP of the engine, SIGCONT after 1 s", _stop("engine", 3, seconds=1.0), (2,)),
    Named("SIGSTOP of a worker, SIGCONT after 1 s", _stop("worker-0", 3, seconds=1.0), (2,)),
    Named("SIGSTOP of the service, SIGCONT after 1 s", _stop("service", 3, seconds=1.0), (0,)),
    Named(
        "SIGSTOP of a further engine for good",
        _stop("engine-1", 2, seconds=None),
        (2,),
        quick=(),
        devices=2,
    ),
    Named("SIGSTOP of the engine for good", _stop("engine", 2, seconds=None), (2,), quick=()),
    Named(
        "SIGSTOP of a worker for good",
        _stop("worker-1", 2, seconds=None),
        (2,),
        cuts=True,
        quick=(),
    ),
    Named("scores that are not finite", _device("runner.not_finite"), quick=(2,)),
    Named("the device is out of memory", _device("runner.out_of_memory"), quick=(0,)),
    Named("a kernel fails", _device("runner.kernel")),
    Named("the device is lost", _device_lost, (2,)),
    Named("clients leave at random points", _leave),
    Named("clients send slowly", _slow),
    Named("a flipped bit in a stored file", _flipped),
    Named(
        "the disk is full",
        _store(_fill, lambda lab: (lab.service.store.parent / "filler").unlink()),
    ),
    Named("the disk is read-only", _store(_remount("ro"), _remount("rw"))),
    Named(
        "the store is removed",
        _store(lambda lab: shutil.rmtree(lab.service.store), _mend_removed),
    ),
    Named("concurrent changes, kill -9 of engine and workers", _history, (2,), cuts=True),
    Named("concurrent changes", _history, (0,)),
    Named("kill -9 of all during changes, restart", _kill_all, cuts=True),
    Named("SIGTERM with stuck clients, restart", _sigterm, cuts=True, quick=(0,)),
)
