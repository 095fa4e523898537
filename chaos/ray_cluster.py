"""`python -m chaos.ray_cluster`: the service on a Ray cluster of several nodes, under faults.

The nodes are processes of this machine, each with a raylet of its own, as `ray start` makes them.
First it compares the routing with one by queues alone. Then, while each fault is injected, clients
predict and others change adapters through whichever replica the proxy chooses; the history of the
changes is checked at the end. `make ray-test` runs it in Ray's environment; docs/ray.md has its
table.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import ray
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from chaos.answers import Answers
from chaos.changes import Changes
from chaos.history import Kind, Undecided, check
from chaos.http import Connection, Cut, NotConnected, Silent
from chaos.load import Load, judge
from deploy.ray.config import NAME
from deploy.ray.running import (
    CONFIG,
    deploy,
    read_config,
    set_environment,
    state,
    wait_until_running,
)
from service.start import StartFailed

_HOST = "127.0.0.1"
_NAMES = ("alpha", "beta", "gamma")
# Unloading is for the replica that is asked alone, so no register explains it.
_KINDS: tuple[Kind, ...] = ("put", "rollback", "delete")
_CHANGED = ("one", "two")
_TEXTS = 30
_MIB = 2**20
# A node holds two replicas: three nodes have room for all that is started here.
_NODE_CPUS, _REPLICA_CPUS = 1.0, 0.5
_LEASE_SECONDS = 3.0
_RECOVERY_SECONDS = 90.0
# A change that a killed node had in hand is answered when Ray has noticed its death.
_NODE_PATIENCE_SECONDS = 60.0
# Clients that make one replica too few, and the texts of each of their requests.
_HEAVY, _HEAVY_TEXTS = 12, 900
# Between two requests of each of the other clients, while there should be one replica too many.
_QUIET_PACE_SECONDS = 1.0
# Adapters of the routing's test, the places for them on each of three replicas, and its clients.
_ROUTED, _PLACES, _ROUTED_REPLICAS, _ROUTED_CLIENTS = 16, 8, 3, 6
_LOADS = re.compile(r'^idspam_adapter_loads_total\{tier="active"\} (\S+)', re.MULTILINE)
# Longer than a replica may be without its lease before Serve used to replace it.
_STORE_LOST_SECONDS = 60.0
# So many right answers in a row are a recovery.
_RIGHT = 12


@dataclass(slots=True)
class Row:
    """What an event did. down: seconds from it to the last failure's end; 0 if nothing failed.
    replicas: before and after. settled: seconds until Serve had the replicas it wants."""

    event: str
    replicas: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    unknown: int = 0
    down: float = 0.0
    settled: float = 0.0
    note: str = ""
    complaints: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Lab:
    """A running cluster with clients. folder: of this run, with the store."""

    nodes: "Nodes"
    config: dict[str, Any]
    answers: Answers
    load: Load
    changes: Changes
    port: int
    folder: Path
    rows: list[Row] = field(default_factory=list)

    def deployment(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["applications"][0]["deployments"][0]
        return found

    async def event(
        self,
        name: str,
        inject: Callable[[Row], Awaitable[object]],
        *,
        replicas: int | None,
        refused: bool = True,
    ) -> None:
        """Inject one event and note what it did.

        Args:
            replicas: to wait for; None: do not.
            refused: whether requests may be refused meanwhile.
        """
        row = Row(name)
        self.rows.append(row)
        since = len(self.load.requests)
        answered, unknown = self.changes.answered, self.changes.unknown
        before = (await asyncio.to_thread(state))[2].get("RUNNING", 0)
        began = time.monotonic()
        try:
            await inject(row)
            if replicas is not None:
                await asyncio.to_thread(
                    partial(wait_until_running, replicas, seconds=_RECOVERY_SECONDS)
                )
                row.settled = time.monotonic() - began
            if not await self.load.answered(
                after=time.monotonic(), times=_RIGHT, seconds=_RECOVERY_SECONDS
            ):
                row.complaints.append("predictions are not answered again")
        except (StartFailed, AssertionError) as error:
            row.complaints.append(str(error))
        after = (await asyncio.to_thread(state))[2].get("RUNNING", 0)
        row.replicas = f"{before} to {after}"
        row.down = self.load.seconds_down(since, began)
        requests = self.load.requests[since:]
        row.counts = Counter(item.outcome for item in requests)
        row.changes = self.changes.answered - answered
        row.unknown = self.changes.unknown - unknown
        bad = ("wrong", "lost", "cut", "unconnected", *(() if refused else ("refused",)))
        row.complaints += [
            f"{item.outcome}: {item.detail}" for item in requests if item.outcome in bad
        ]
        sys.stderr.write(f"ray: {_line(row)}\n")
        for complaint in row.complaints[:5]:
            sys.stderr.write(f"ray:   {complaint[:300]}\n")


class Nodes:
    """A Ray cluster: a head with the proxy and no replicas, and nodes that can be killed."""

    def __init__(self, folder: Path, port: int) -> None:
        head = {
            "num_cpus": 0,
            "object_store_memory": 80 * _MIB,
            "include_dashboard": False,
            "gcs_server_port": port,
            "temp_dir": str(folder),
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        ray.init(address=self._cluster.address, log_to_driver=False, namespace="serve")

    def add(self) -> None:
        node = self._cluster.add_node(num_cpus=_NODE_CPUS, object_store_memory=80 * _MIB)
        self._nodes[node.node_id] = node

    def kill(self, node_id: str) -> int:
        """SIGKILL to a node's raylet and to everything that it started; returns how many."""
        node = self._nodes.pop(node_id)
        pids = [item.process.pid for group in node.all_processes.values() for item in group]
        pids = list(dict.fromkeys([*pids, *_descendants(pids)]))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # What it leaves: sockets, and its place in the list of nodes.
        self._cluster.remove_node(node, allow_graceful=False)
        return len(pids)

    def shutdown(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def replicas() -> list[dict[str, Any]]:
    """The running replicas: `replica_id`, `pid`, `node_id`."""
    details = _get_global_client().get_serve_details()
    found = details["applications"][NAME]["deployments"][NAME]["replicas"]
    return [item for item in found if str(item["state"]).endswith("RUNNING")]


def _arguments() -> Namespace:
    parser = ArgumentParser(prog="python -m chaos.ray_cluster", description=__doc__)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: by the clock")
    parser.add_argument(
        "--port", type=int, default=8610, help="of the proxy; Ray's own is the next"
    )
    parser.add_argument(
        "--only", default="", help="events whose name contains one of these, comma-separated"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each event, at least")
    return parser.parse_args()


async def run(arguments: Namespace) -> list[Row]:
    seed = arguments.seed or time.time_ns() % 10**6
    backbone = load_backbone(arguments.backbone, device="cpu")
    answers = Answers(backbone, dtype="float32", seed=seed, texts=_TEXTS)
    set_environment()
    with _folder() as folder:
        config = _config(arguments, folder)
        # In this thread, as its handlers of signals need; the clients wait meanwhile.
        nodes = Nodes(folder / "ray", arguments.port + 1)
        try:
            for _ in range(2):
                nodes.add()
            lab_rows: list[Row] = []
            await asyncio.to_thread(deploy, config)
            seconds = await asyncio.to_thread(wait_until_running, _ROUTED_REPLICAS)
            sys.stderr.write(f"ray: three replicas on two nodes run after {seconds:.0f} s\n")
            if any(part in "routing" for part in arguments.only.split(",")):
                lab_rows.append(await _routing(arguments.port, answers, seed, arguments.seconds))
            config["applications"][0]["deployments"][0]["num_replicas"] = 2
            await asyncio.to_thread(deploy, config)
            await asyncio.to_thread(wait_until_running, 2)
            async with _clients(arguments.port, answers, seed) as (load, changes):
                lab = Lab(
                    nodes, config, answers, load, changes, arguments.port, folder, rows=lab_rows
                )
                for name, event in _EVENTS:
                    if any(part in name for part in arguments.only.split(",")):
                        await event(lab, arguments.seconds)
            lab.rows.append(await _history(changes))
        finally:
            await asyncio.to_thread(nodes.shutdown)
    return lab.rows


@asynccontextmanager
async def _clients(port: int, answers: Answers, seed: int) -> AsyncIterator[tuple[Load, Changes]]:
    names = list(_NAMES)
    load = Load(_HOST, port, answers, names, clients=4, seed=seed)
    changes = Changes(
        _HOST,
        [port],
        answers,
        _CHANGED,
        writers=2,
        readers=3,
        seed=seed,
        kinds=_KINDS,
        patience=_NODE_PATIENCE_SECONDS,
    )
    for name in names:
        version = answers.version()
        answers.learn(version)
        await _put(port, name, version.file)
    async with load, changes:
        yield load, changes
    await changes.read_all()


async def _history(changes: Changes) -> Row:
    """For each replica: all changes, whoever took them, and what this one answered.

    Two replicas may switch at different moments while a change is on its way.
    """
    row = Row("**history of the changes**")
    row.changes, row.unknown = changes.answered, changes.unknown
    row.complaints = list(changes.faults)
    checked = 0
    for answerer in sorted(changes.answerers, key=str):
        history = changes.seen_at(answerer)
        checked += len(history)
        try:
            violations = await asyncio.to_thread(check, history)
        except Undecided as error:
            row.complaints.append(f"{answerer}: {error}")
        else:
            row.complaints += [f"{answerer}: {violation}" for violation in violations]
    row.note = f"{len(changes.answerers)} histories, {checked} operations"
    for complaint in row.complaints:
        sys.stderr.write(f"ray:   {complaint}\n")
    return row


# Routing


@dataclass(slots=True)
class _Routed:
    """Requests of many adapters. loads: adapters that entered a device. by_replica: requests.
    replicas_of: those that answered for an adapter."""

    outcomes: Counter[str]
    loads: float
    by_replica: Counter[str]
    replicas_of: dict[str, set[str]]

    @property
    def loads_a_request(self) -> float:
        return self.loads / max(1, self.outcomes.total())

    @property
    def busiest(self) -> float:
        """Requests of the busiest replica, as a multiple of an even share."""
        return max(self.by_replica.values()) * _ROUTED_REPLICAS / self.by_replica.total()

    def __str__(self) -> str:
        each = sum(map(len, self.replicas_of.values())) / len(self.replicas_of)
        return (
            f"{100 * self.loads_a_request:.1f} loads in 100 requests, {each:.1f} replicas for an "
            f"adapter, the busiest has {self.busiest:.2f} of its share"
        )


async def _routing(port: int, answers: Answers, seed: int, seconds: float) -> Row:
    """More adapters than a device has places: with the routing they are seldom loaded."""
    row = Row("routing", replicas=f"{_ROUTED_REPLICAS}")
    names = [f"routed-{number}" for number in range(_ROUTED)]
    for name in names:
        await _put(port, name, answers.version().file)
    by_queue = await _route(port, answers, names, seed, seconds, hinted=False)
    by_adapter = await _route(port, answers, names, seed, seconds, hinted=True)
    row.counts = by_queue.outcomes + by_adapter.outcomes
    row.note = (
        f"{_ROUTED} adapters, {_PLACES} places on each replica. By queues alone: {by_queue}. "
        f"By adapters: {by_adapter}"
    )
    if set(row.counts) != {"right"}:
        row.complaints.append(f"not all were answered right: {dict(row.counts)}")
    if by_adapter.loads_a_request > by_queue.loads_a_request / 3:
        row.complaints.append("the routing saves too few loads")
    if by_adapter.busiest > 2:
        row.complaints.append("the routing makes a hot spot")
    for complaint in (str(_line(row)), *row.complaints):
        sys.stderr.write(f"ray: {complaint}\n")
    return row


async def _route(
    port: int, answers: Answers, names: list[str], seed: int, seconds: float, *, hinted: bool
) -> _Routed:
    """Ask for all adapters alike, for a while.

    Args:
        hinted: False: a hint that names no adapter, so that queues alone decide.
    """
    headers = {} if hinted else {"X-Session-Id": "-"}
    outcomes: Counter[str] = Counter()
    by_replica: Counter[str] = Counter()
    replicas_of: dict[str, set[str]] = {name: set() for name in names}

    async def ask(number: int, until: float, *, counts: bool) -> None:
        chance = random.Random(f"{seed} {number} {hinted} {counts}")
        connection = Connection(_HOST, port)
        while time.monotonic() < until:
            name, texts = chance.choice(names), [chance.randrange(4)]
            body = json.dumps(answers.body(name, texts)).encode()
            answer = await connection.ask("POST", "/v1/predict", body, seconds=30, headers=headers)
            if counts:
                outcomes[judge(answers, answer, texts)[0]] += 1
                by_replica[answer.replica] += 1
                replicas_of[name].add(answer.replica)
        connection.close()

    async def ask_all(length: float, *, counts: bool) -> None:
        until = time.monotonic() + length
        await asyncio.gather(
            *(ask(number, until, counts=counts) for number in range(_ROUTED_CLIENTS))
        )

    # Until the adapters are where this routing leaves them, and the replicas have said so.
    await ask_all(seconds, counts=False)
    before = await _loads(port)
    await ask_all(seconds, counts=True)
    return _Routed(outcomes, await _loads(port) - before, by_replica, replicas_of)


async def _loads(port: int) -> float:
    """Adapters that have entered the devices of all replicas. Each answers for itself."""
    found: dict[str, float] = {}
    async with httpx.AsyncClient(base_url=f"http://{_HOST}:{port}", timeout=30) as client:
        for _ in range(200):
            answer = await client.get("/metrics")
            found[answer.headers["x-replica"]] = float(_LOADS.findall(answer.text)[0])
            if len(found) == _ROUTED_REPLICAS:
                return sum(found.values())
    raise StartFailed(f"of {_ROUTED_REPLICAS} replicas {len(found)} answer")


# Events


async def _steady(lab: Lab, seconds: float) -> None:
    await lab.event("nothing", lambda _: asyncio.sleep(seconds), replicas=2, refused=False)


async def _kill_node(lab: Lab, seconds: float) -> None:
    async def inject(row: Row) -> None:
        await asyncio.sleep(seconds / 4)
        victim = (await asyncio.to_thread(replicas))[0]
        killed = await asyncio.to_thread(lab.nodes.kill, victim["node_id"])
        row.note = f"{killed} processes"
        await asyncio.sleep(seconds)

    await lab.event("kill -9 of a node", inject, replicas=2)
    lab.nodes.add()


async def _kill_replica(lab: Lab, seconds: float) -> None:
    async def inject(_: Row) -> None:
        await asyncio.sleep(seconds / 4)
        victim = (await asyncio.to_thread(replicas))[0]
        os.kill(victim["pid"], signal.SIGKILL)
        await asyncio.sleep(seconds)

    await lab.event("kill -9 of a replica", inject, replicas=2)


async def _stop_replica(lab: Lab, seconds: float) -> None:
    """Its lease ends while it is stopped: what it answers afterwards must not be old."""

    async def inject(_: Row) -> None:
        victim = (await asyncio.to_thread(replicas))[0]
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            await asyncio.sleep(max(seconds, 2 * _LEASE_SECONDS))
        finally:
            os.kill(victim["pid"], signal.SIGCONT)
        await asyncio.sleep(seconds)

    await lab.event("SIGSTOP of a replica, then SIGCONT", inject, replicas=2)


async def _scale(lab: Lab, seconds: float) -> None:
    for count in (4, 1, 2):

        async def inject(_: Row, count: int = count) -> None:
            lab.deployment()["num_replicas"] = count
            await asyncio.to_thread(deploy, lab.config)
            await asyncio.sleep(seconds / 2)

        await lab.event(f"scale to {count}", inject, replicas=count, refused=False)


async def _autoscale(lab: Lab, seconds: float) -> None:
    """Load that one replica cannot carry makes another; without it one is left."""
    deployment = lab.deployment()
    fixed = deployment.pop("num_replicas")
    deployment["autoscaling_config"] = {
        **read_config(CONFIG)["applications"][0]["deployments"][0]["autoscaling_config"],
        "min_replicas": 1,
        "max_replicas": 3,
        "upscale_delay_s": 1,
        "downscale_delay_s": 5,
        "look_back_period_s": 5,
        "metrics_interval_s": 1,
    }

    async def rise(row: Row) -> None:
        await asyncio.to_thread(deploy, lab.config)
        await asyncio.to_thread(wait_until_running, 1)
        began = time.monotonic()
        heavy = [asyncio.create_task(_ask_much(lab, number)) for number in range(_HEAVY)]
        try:
            while (await asyncio.to_thread(state))[2].get("RUNNING", 0) < 2:
                assert time.monotonic() - began < _RECOVERY_SECONDS, "no second replica came"
                await asyncio.sleep(0.2)
            row.settled = time.monotonic() - began
        finally:
            for task in heavy:
                task.cancel()
            await asyncio.gather(*heavy, return_exceptions=True)
        row.note = f"{_HEAVY} clients with {_HEAVY_TEXTS} texts a request"

    async def fall(_: Row) -> None:
        await asyncio.sleep(seconds)

    await lab.event("autoscaling: more load", rise, replicas=None)
    # On two busy cores the clients alone may be enough for two replicas.
    lab.load.pace = lab.changes.pace = _QUIET_PACE_SECONDS
    await lab.event("autoscaling: less load", fall, replicas=1)
    lab.load.pace = lab.changes.pace = 0.0
    del deployment["autoscaling_config"]
    deployment["num_replicas"] = fixed
    await asyncio.to_thread(deploy, lab.config)
    await asyncio.to_thread(wait_until_running, fixed)


async def _ask_much(lab: Lab, number: int) -> None:
    """Requests that take the engine longer than the proxy."""
    texts = [text % _TEXTS for text in range(_HEAVY_TEXTS)]
    body = json.dumps(lab.answers.body(_NAMES[number % len(_NAMES)], texts)).encode()
    connection = Connection(_HOST, lab.port)
    while True:
        with suppress(NotConnected, Cut, Silent):
            await connection.ask("POST", "/v1/predict", body, seconds=60)


async def _disconnect(lab: Lab, seconds: float) -> None:
    """Clients that go away: nothing of theirs is computed for long, and others are answered."""
    body = json.dumps({**lab.answers.body("alpha", list(range(_TEXTS))), "timeout_ms": 8000})
    head = f"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n{body}".encode()

    async def inject(row: Row) -> None:
        until, gone = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            _, writer = await asyncio.open_connection(_HOST, lab.port)
            # Some before their whole body is sent.
            writer.write(request if gone % 3 else request[:-100])
            with suppress(OSError):
                await writer.drain()
            await asyncio.sleep(0.02)
            writer.transport.abort()
            gone += 1
        row.note = f"{gone} clients left"

    await lab.event("clients disconnect", inject, replicas=2, refused=False)


async def _lose_store(lab: Lab, seconds: float) -> None:
    """The store of all replicas is gone for a while: none may answer, and none is replaced, since
    no other would do better."""

    async def inject(row: Row) -> None:
        store, away = lab.folder / "store", lab.folder / "away"
        before = {item["replica_id"] for item in await asyncio.to_thread(replicas)}
        await asyncio.sleep(seconds / 4)
        store.rename(away)
        await asyncio.sleep(_STORE_LOST_SECONDS)
        away.rename(store)
        began = time.monotonic()
        answered = await lab.load.answered(after=began, times=1, seconds=_RECOVERY_SECONDS)
        assert answered, "predictions are not answered again"
        answers = time.monotonic() - began
        row.note = f"{_STORE_LOST_SECONDS:g} s; answered {answers:.1f} s after it was back"
        after = {item["replica_id"] for item in await asyncio.to_thread(replicas)}
        assert before == after, "replicas were replaced"
        await asyncio.sleep(seconds)

    await lab.event("the store is out of reach", inject, replicas=2)


async def _bad_setting(lab: Lab, seconds: float) -> None:
    """A change of the settings that no replica can start with: the old ones go on."""

    async def inject(row: Row) -> None:
        bad = deepcopy(lab.config)
        bad["applications"][0]["args"]["IDSPAM_DTYPE"] = "float64"
        await asyncio.to_thread(deploy, bad)
        try:
            await asyncio.to_thread(partial(_wait_until_failed, _RECOVERY_SECONDS))
        except StartFailed as error:
            row.note = f"`{error}`"
            assert "IDSPAM_DTYPE" in row.note, row.note
        await asyncio.sleep(seconds / 2)
        await asyncio.to_thread(deploy, lab.config)

    await lab.event("a bad setting is deployed", inject, replicas=2, refused=False)


def _wait_until_failed(seconds: float) -> None:
    """
    Raises:
        StartFailed: it failed, and this is why.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if state()[0] == "DEPLOY_FAILED":
            wait_until_running(1)
        time.sleep(0.1)
    raise AssertionError("the bad setting was not refused")


_EVENTS: tuple[tuple[str, Callable[[Lab, float], Awaitable[None]]], ...] = (
    ("nothing", _steady),
    ("kill node", _kill_node),
    ("kill replica", _kill_replica),
    ("stop replica", _stop_replica),
    ("scale", _scale),
    ("autoscaling", _autoscale),
    ("disconnect", _disconnect),
    ("lose store", _lose_store),
    ("bad setting", _bad_setting),
)

# The cluster


def _config(arguments: Namespace, folder: Path) -> dict[str, Any]:
    config = read_config(CONFIG)
    config["proxy_location"] = "HeadOnly"
    config["http_options"] |= {"host": _HOST, "port": arguments.port}
    application = config["applications"][0]
    application["args"] = {
        "IDSPAM_BACKBONE": str(arguments.backbone),
        "IDSPAM_DTYPE": "float32",
        "IDSPAM_DEVICE": "cpu",
        "IDSPAM_ZOO_DIR": "off",
        "IDSPAM_ADAPTER_DIR": str(folder / "caches"),
        "IDSPAM_ADAPTER_STORE": str(folder / "store"),
        "IDSPAM_LEASE_SECONDS": str(_LEASE_SECONDS),
        "IDSPAM_MAX_ACTIVE_ADAPTERS": str(_PLACES),
        "IDSPAM_DRAIN_SECONDS": "10",
        "IDSPAM_LOG_LEVEL": "warning",
    }
    deployment = application["deployments"][0]
    del deployment["autoscaling_config"]
    deployment |= {"num_replicas": _ROUTED_REPLICAS, "graceful_shutdown_timeout_s": 20}
    deployment["ray_actor_options"] = {"num_cpus": _REPLICA_CPUS}
    return config


async def _put(port: int, name: str, file: bytes) -> None:
    until = time.monotonic() + _RECOVERY_SECONDS
    connection, answer = Connection(_HOST, port), None
    while time.monotonic() < until:
        with suppress(NotConnected, Cut, Silent):
            answer = await connection.ask(
                "PUT",
                f"/v1/adapters/{name}",
                file,
                seconds=30,
                kind="application/octet-stream",
            )
            if answer.status < 300:
                connection.close()
                return
        await asyncio.sleep(0.2)
    raise StartFailed(f"no upload is accepted: {answer}")


def _descendants(pids: Iterable[int]) -> list[int]:
    """Processes that these have started, and so on. Ray's workers are in sessions of their own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, left = [], list(pids)
    while left:
        for child in children.get(left.pop(), ()):
            found.append(child)
            left.append(child)
    return found


@contextmanager
def _folder() -> Iterator[Path]:
    """With a short name: Ray has sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="idspam-ray-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# The table

_HEAD = (
    "| event | replicas | right | refused | cut | wrong | lost | changes | of unknown outcome "
    "| seconds with failures | seconds to settle |"
)


def table(rows: Sequence[Row]) -> str:
    lines = [_HEAD, "|---|---|---|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Row) -> str:
    count = row.counts
    cells = [
        f"{row.event} ({row.note})" if row.note else row.event,
        row.replicas,
        count["right"],
        count["refused"],
        count["cut"] + count["unconnected"],
        count["wrong"],
        count["lost"],
        row.changes,
        row.unknown,
        f"{row.down:.1f}",
        f"{row.settled:.1f}" + (" FAILED" if row.complaints else ""),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """0 if nothing was wrong, stale or lost, and the service always recovered."""
    arguments = _arguments()
    began = time.monotonic()
    try:
        rows = asyncio.run(run(arguments))
    except StartFailed as error:
        sys.stderr.write(f"ray: {error}\n")
        return 2
    sys.stdout.write(
        f"{table(rows)}\n\n{os.cpu_count()} cores, Ray {ray.__version__}, "
        f"{time.monotonic() - began:.0f} s\n"
    )
    return 1 if any(row.complaints for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
