"""Replicas on one store: roll-outs while clients ask all of them; throughput and delay by number.

For each store (a folder; S3, played by moto's server on this machine) and number of replicas,
clients predict at every replica, and new revisions of one adapter are published, at each replica in
turn, with `wait=all`. These must be zero: failed requests and roll-outs; *stale* answers, by an
older revision than the last one whose roll-out had returned before the request was sent; answers
*backwards*, by an older revision than the same client has seen from that replica. Then the protocol
is played for up to 1,000 replicas with measured times of its steps (`benchmarks.rollout_model`).
"""

import hashlib
import os
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone, check_fits, random_adapter
from adapters.format.files import serialize, validate
from benchmarks.arguments import (
    add_model_arguments,
    add_workers_argument,
    at_least,
    counts,
    duration,
)
from benchmarks.load import load, write_bodies
from benchmarks.loop import percentiles_ms
from benchmarks.report import BenchmarkFailed, Report, progress
from benchmarks.rollout_model import Seconds, Steps, play, requests_per_second
from benchmarks.servers import Server, processes_of, service, settings_of
from benchmarks.shapes import described, located
from benchmarks.shared_stores import STORES, measured, shared_store
from benchmarks.subject import MEAN_TOKENS
from benchmarks.swap import Connection
from benchmarks.texts import make_texts, words_of

NAME = "rolled"
TEXT = "win a free ticket now"
# Answers of load, in the quiet comparison of throughput.
_TEXTS, _TEXTS_PER_REQUEST, _CONNECTIONS = 2048, 32, 4
SIMULATED = (1, 2, 4, 8, 16, 64, 256, 1000)


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser, dtype="float32", narrow=False)
    add_workers_argument(parser)
    parser.add_argument("--replicas", type=counts, default=[1, 2, 4], help="as 1,2,4")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--rollouts", type=at_least(1), default=200)
    parser.add_argument("--clients", type=at_least(1), default=2, help="for each replica")
    parser.add_argument(
        "--pause", type=float, default=0.02, help="seconds between a client's requests"
    )
    parser.add_argument("--threads", type=at_least(1), default=1, help="of each replica")
    parser.add_argument("--follow", type=duration, default=0.5, help="IDSPAM_FOLLOW_SECONDS")
    parser.add_argument("--lease", type=duration, default=5.0, help="IDSPAM_LEASE_SECONDS")
    parser.add_argument("--seconds", type=duration, default=6.0, help="of each load, if any")
    parser.add_argument("--rounds", type=int, default=2, help="of the loads; 0: no throughput")
    parser.add_argument(
        "--store-limit",
        type=float,
        default=5500.0,
        help="requests/s that the simulated S3 answers, as Amazon's does for a prefix; 0: no limit",
    )
    parser.add_argument("--plays", type=at_least(1), default=500, help="of each simulation")


@dataclass(slots=True)
class Tally:
    """What came back from one number of replicas. Only `answers` and the times may grow."""

    answers: int = 0
    failed: int = 0
    stale: int = 0
    backwards: int = 0
    refused: int = 0
    reasons: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rollouts: list[float] = field(default_factory=list)

    def answered(self, number: int, *, floor: int, seen: int) -> None:
        """Count an answer by revision `number`.

        Args:
            floor: the last revision whose roll-out had returned before the request was sent.
            seen: the newest that this client has seen from this replica.
        """
        self.stale += number < floor
        self.backwards += number < seen


class Revisions:
    """The order of the revisions, and which one the last finished roll-out brought."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.committed = 0

    def begin(self, data: bytes) -> int:
        """A roll-out begins, so this revision may answer from now on. Returns its number."""
        number = len(self._numbers) + 1
        self._numbers[hashlib.sha256(data).hexdigest()] = number
        return number

    def number(self, revision: str) -> int:
        return self._numbers[revision]


def run(options: Namespace) -> Report:
    if options.lease < 4 * options.follow:
        raise BenchmarkFailed("--lease must be at least four times --follow")
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="idspam-replicas-") as temporary:
        source = located(options.backbone, Path(temporary))
        backbone = load_backbone(source, device="cpu")
        warm, size = _warming(backbone), len(serialize(random_adapter(backbone)))
        for kind in options.stores:
            row, figure = _on_store(kind, options, source, backbone, warm, Path(temporary) / kind)
            rows += row
            figures.append(figure)
    conditions = {
        "backbone": described(options.backbone),
        "device": options.device,
        "dtype": options.dtype,
        "replicas": f"{processes_of(options)} each, {options.threads} threads for computing",
        "stores": "a folder of this machine; S3 as moto's server plays it on this machine",
        "roll-outs": f"{options.rollouts} of {size:,} bytes, at each replica in turn, wait=all",
        "clients": f"{options.clients} threads for each replica, one text a request, "
        f"{options.pause:g} s between requests",
        "follow": f"{options.follow:g} s, lease {options.lease:g} s",
        "throughput": f"{_TEXTS_PER_REQUEST} texts of {MEAN_TOKENS:.0f} tokens a request, "
        f"{_CONNECTIONS} connections to each replica, {options.rounds} rounds in turns",
        "cores": f"{os.cpu_count()}: replicas, store and clients share them",
        "simulated": f"{options.plays} roll-outs for each number, from measured steps; S3 "
        f"answers {options.store_limit:,.0f} requests/s (0: any number)",
    }
    columns = ("store", "replicas", "roll-out p50 s", "p99 s", "roll-outs failed", "answers")
    more = ("failed", "stale", "backwards", "p50 ms", "p99 ms", "texts/s", "x one")
    return Report("replicas", (*columns, *more), rows, figures, conditions)


def _on_store(
    kind: str, options: Namespace, source: str, backbone: Backbone, warm: Seconds, folder: Path
) -> tuple[list[list[str]], dict[str, Any]]:
    folder.mkdir()
    measured_rows: list[dict[str, Any]] = []
    with shared_store(kind, folder) as url:
        progress(f"{kind}: the steps of a roll-out")
        steps = measured(f"{url}-steps", serialize(random_adapter(backbone)), warm)
        for count in options.replicas:
            progress(f"{kind}: {count} replicas")
            own = folder / str(count)
            own.mkdir()
            with _cluster(f"{url}-{count}", count, options, source, own) as servers:
                tally = _rolled_out(servers, backbone, options)
                # The largest cluster compares: some of its replicas, all of them, in turns.
                last = options.rounds > 0 and count == max(options.replicas)
                rates = _throughput(servers, options, source, own) if last else {}
            measured_rows.append(_figures(count, tally))
            # The whole takes a quarter of an hour.
            progress("  " + ", ".join(f"{key} {value}" for key, value in _told(measured_rows[-1])))
            if count == 1:
                steps = _with_the_engines_part(steps, tally.rollouts, options)
    for figure in measured_rows:
        if figure["replicas"] in rates:
            figure["texts_per_second"] = rates[figure["replicas"]]
            figure["over_one"] = rates[figure["replicas"]] / rates[min(rates)]
    # A folder has no such limit of its own.
    limit = (options.store_limit or None) if kind == "s3" else None
    simulated = [_simulated(steps, count, options, limit) for count in SIMULATED]
    rows = [_row(kind, figure) for figure in measured_rows]
    for figure in simulated:
        cells = [f"{figure['p50_s']:.2f}", f"{figure['p99_s']:.2f}"]
        rows.append([f"{kind}, simulated", str(figure["replicas"]), *cells, *[""] * 9])
    means = {
        name: float(np.median(getattr(steps, name)))
        for name in ("upload", "create", "put", "read", "fetch", "warm")
    }
    states = {str(count): float(np.median(seconds)) for count, seconds in steps.states.items()}
    return rows, {
        "store": kind,
        "measured": measured_rows,
        "simulated": simulated,
        "step_median_s": means | {"states": states},
    }


@contextmanager
def _cluster(
    url: str, count: int, options: Namespace, source: str, folder: Path
) -> Iterator[list[Server]]:
    """That many replicas on a new store."""
    settings = settings_of(options) | {
        "BACKBONE": source,
        "ADAPTER_STORE": url,
        "FOLLOW_SECONDS": f"{options.follow:g}",
        "LEASE_SECONDS": f"{options.lease:g}",
    }
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        with ExitStack() as stack:
            yield [
                stack.enter_context(
                    service(
                        folder / f"cache-{number}",
                        log=folder / f"{number}.log",
                        **settings,
                        REPLICA=f"replica-{number}",
                    )
                )
                for number in range(count)
            ]
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _rolled_out(servers: Sequence[Server], backbone: Backbone, options: Namespace) -> Tally:
    """Roll-outs while clients predict at every replica."""
    tally, revisions, lock, over = Tally(), Revisions(), threading.Lock(), threading.Event()

    def publish(number: int, connection: Connection) -> None:
        data = serialize(random_adapter(backbone, seed=number))
        revision = revisions.begin(data)
        began = time.perf_counter()
        try:
            connection.upload(NAME, data)
        except BenchmarkFailed as error:
            tally.refused += 1
            tally.reasons.append(str(error)[:300])
        else:
            tally.rollouts.append(time.perf_counter() - began)
            revisions.committed = revision

    def ask(connection: Connection, seen: int) -> int:
        """Returns the number of the revision that answered, or the one seen before."""
        floor, sent = revisions.committed, time.perf_counter()
        status, content = connection.predict(NAME, TEXT)
        seconds = time.perf_counter() - sent
        number = revisions.number(content["results"][0]["revision"]) if status == 200 else 0
        with lock:
            tally.answers += 1
            tally.seconds.append(seconds)
            if status != 200:
                tally.failed += 1
                tally.reasons.append(str(content)[:300])
                return seen
            tally.answered(number, floor=floor, seen=seen)
        return max(seen, number)

    def client(server: Server) -> None:
        seen = 0
        with closing(Connection(server.url)) as connection:
            while not over.is_set():
                seen = ask(connection, seen)
                over.wait(options.pause)

    with ExitStack() as stack:
        every = [stack.enter_context(closing(Connection(server.url))) for server in servers]
        publish(0, every[0])
        if tally.refused:
            raise BenchmarkFailed(f"the first upload: {tally.reasons[0]}")
        tally.rollouts.clear()
        pool = stack.enter_context(ThreadPoolExecutor(len(servers) * options.clients))
        futures = [
            pool.submit(client, server) for server in servers for _ in range(options.clients)
        ]
        try:
            for number in range(1, options.rollouts + 1):
                publish(number, every[number % len(every)])
                # At once at every replica, whatever the clients are doing.
                for connection in every:
                    ask(connection, 0)
        finally:
            over.set()
        for future in futures:
            future.result()
    return tally


def _throughput(
    servers: Sequence[Server], options: Namespace, source: str, folder: Path
) -> dict[int, float]:
    """texts/s of the first 1, 2, ... replicas, in turns; medians."""
    texts = make_texts(words_of(source), count=_TEXTS, mean_tokens=MEAN_TOKENS)
    starts = range(0, len(texts) - _TEXTS_PER_REQUEST + 1, _TEXTS_PER_REQUEST)
    inputs = [texts[start : start + _TEXTS_PER_REQUEST] for start in starts]
    bodies = write_bodies(
        folder / "bodies.jsonl", [{"adapter": NAME, "inputs": some} for some in inputs]
    )

    def one(server: Server) -> float:
        return load(
            f"{server.url}/v1/predict",
            bodies,
            texts_per_request=_TEXTS_PER_REQUEST,
            connections=_CONNECTIONS,
            seconds=options.seconds,
            warm_up=options.seconds / 4,
        ).texts_per_second

    rates: dict[int, list[float]] = {count: [] for count in options.replicas}
    # The first round warms up.
    for turn in range(options.rounds + 1):
        for count in options.replicas:
            progress(f"throughput of {count} replicas, round {turn}")
            with ThreadPoolExecutor(count) as pool:
                rate = sum(pool.map(one, servers[:count]))
            if turn:
                rates[count].append(rate)
    return {count: median(found) for count, found in rates.items()}


def _warming(backbone: Backbone, samples: int = 20) -> Seconds:
    """What a replica does with a file that it has fetched: hash, read and check it."""
    seconds = []
    for number in range(samples):
        data = serialize(random_adapter(backbone, seed=number))
        began = time.perf_counter()
        hashlib.sha256(data).hexdigest()
        check_fits(validate(data).spec, backbone)
        seconds.append(time.perf_counter() - began)
    return np.array(seconds)


def _told(figure: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is worth seeing while the rest runs."""
    for key, value in figure.items():
        if isinstance(value, float):
            yield key, f"{value:.2f}"
        elif value:
            yield key, str(value)


def _with_the_engines_part(steps: Steps, rollouts: Sequence[float], options: Namespace) -> Steps:
    """What a roll-out on one replica takes beyond the store's calls is the check and the engine's
    try of the new revision."""
    without = play(replace(steps, warm=np.zeros(1)), 1, follow_seconds=options.follow)
    rest = np.array(rollouts) - float(np.median(without.total))
    return replace(steps, warm=np.maximum(rest, steps.warm.min()))


def _figures(count: int, tally: Tally) -> dict[str, Any]:
    if not tally.rollouts:
        raise BenchmarkFailed(f"no roll-out succeeded: {tally.reasons[:1]}")
    return {
        "replicas": count,
        "rollouts": len(tally.rollouts),
        "rollouts_failed": tally.refused,
        "rollout_p50_s": float(np.percentile(tally.rollouts, 50)),
        "rollout_p99_s": float(np.percentile(tally.rollouts, 99)),
        "rollout_max_s": max(tally.rollouts),
        "answers": tally.answers,
        "failed": tally.failed,
        "stale": tally.stale,
        "backwards": tally.backwards,
        "reasons": tally.reasons[:10],
        **percentiles_ms(tally.seconds),
    }


def _simulated(steps: Steps, count: int, options: Namespace, limit: float | None) -> dict[str, Any]:
    played = play(
        steps,
        count,
        follow_seconds=options.follow,
        plays=options.plays,
        store_requests_per_second=limit,
    )
    return {
        "replicas": count,
        "p50_s": played.percentile(50),
        "p99_s": played.percentile(99),
        "prepare_p50_s": float(np.median(played.prepare)),
        "commit_p50_s": float(np.median(played.commit)),
        "store_requests_per_second": {
            when: requests_per_second(
                count, follow_seconds=options.follow, lease_seconds=options.lease, hurry=hurry
            )
            for when, hurry in (("idle", False), ("in a roll-out", True))
        },
    }


def _row(kind: str, figure: dict[str, Any]) -> list[str]:
    rate, over = figure.get("texts_per_second"), figure.get("over_one")
    return [
        kind,
        str(figure["replicas"]),
        f"{figure['rollout_p50_s']:.2f}",
        f"{figure['rollout_p99_s']:.2f}",
        f"{figure['rollouts_failed']} of {figure['rollouts'] + figure['rollouts_failed']}",
        f"{figure['answers']:,}",
        *(f"{figure[name]}" for name in ("failed", "stale", "backwards")),
        f"{figure['p50_ms']:.1f}",
        f"{figure['p99_ms']:.1f}",
        f"{rate:,.0f}" if rate else "",
        f"{over:.2f}" if over else "",
    ]
