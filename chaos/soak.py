"""`python -m chaos.soak`: ten minutes of uploads and predictions, in which memory, descriptors,
threads and latency are sampled: none of them may grow.

It prints a table, writes a plot, and fails if a slope is over its bound. `make soak` runs it.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from chaos.answers import Answers, Version
from chaos.http import Connection, Cut, NotConnected, Silent
from chaos.load import PATIENCE_SECONDS, judge
from chaos.service import Service

_TEXTS_PER_REQUEST = 32
_CONNECTIONS = 4
_NAMES = ("alpha", "beta", "gamma")
_CHANGED = 20
# A changed name is deleted after so many uploads.
_DELETED_AFTER = 9
_SAMPLES = 120
# The first part, in which caches and pools fill, does not count.
_WARM_UP_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Bound:
    """How much a line may grow from the end of the warm-up to the end: an absolute amount, or a
    share of its mean, whichever is more. It is the growth of the straight line through it."""

    absolute: float
    share: float


BOUNDS = {
    "memory, MiB": Bound(16.0, 0.03),
    "descriptors": Bound(4.0, 0.0),
    "threads": Bound(2.0, 0.0),
    "latency p50, ms": Bound(5.0, 0.25),
}


@dataclass(slots=True)
class Line:
    """A figure over time. values: (seconds since the start, value)."""

    name: str
    unit: str
    values: list[tuple[float, float]] = field(default_factory=list)

    def settled(self) -> list[tuple[float, float]]:
        end = self.values[-1][0]
        return [item for item in self.values if item[0] >= _WARM_UP_SHARE * end]

    def growth(self) -> float:
        """What the least-squares line through the settled values gains from their start to their
        end."""
        values = self.settled()
        times, figures = [item[0] for item in values], [item[1] for item in values]
        middle, average = mean(times), mean(figures)
        spread = sum((at - middle) ** 2 for at in times)
        if not spread:
            return 0.0
        slope = sum((at - middle) * (figure - average) for at, figure in values) / spread
        return slope * (times[-1] - times[0])

    @property
    def allowed(self) -> float:
        bound = BOUNDS[self.unit]
        return max(bound.absolute, bound.share * mean([item[1] for item in self.settled()]))

    @property
    def flat(self) -> bool:
        return self.growth() <= self.allowed


class Soak:
    """One run over a started service."""

    def __init__(self, service: Service, answers: Answers, arguments: Namespace) -> None:
        self._service = service
        self._answers = answers
        self._arguments = arguments
        self._chance = random.Random(1)
        self._began = 0.0
        self._latencies: list[float] = []
        self.lines: dict[str, Line] = {}
        self.texts = self.uploads = self.deletes = 0
        self.faults: list[str] = []

    async def run(self) -> None:
        seconds: float = self._arguments.seconds
        for name in _NAMES:
            self._answers.learn(await self._put(self._connection(), name))
        self._began = time.monotonic()
        end = self._began + seconds
        sample = self._sampler()
        requests = -(-self._arguments.predictions // _TEXTS_PER_REQUEST)
        async with asyncio.TaskGroup() as group:
            for number in range(_CONNECTIONS):
                share = requests // _CONNECTIONS + (number < requests % _CONNECTIONS)
                group.create_task(self._paced(self._predictor(), share, end))
            group.create_task(self._paced(self._uploader(), self._arguments.uploads, end))
            group.create_task(self._paced(sample, _SAMPLES, end))
        sample()

    async def _paced(self, turn: Callable[[], object], times: int, end: float) -> None:
        """Take this many turns, each at a random moment of its own share of the run; late turns
        follow at once, until the end. Even turns of several callers would drift in and out of step
        with each other, and the latency with them."""
        began = time.monotonic()
        for number in range(times):
            at = began + (end - began) * (number + self._chance.random()) / times
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            if time.monotonic() > end:
                return
            result = turn()
            if asyncio.iscoroutine(result):
                await result

    def _predictor(self) -> Callable[[], object]:
        connection = self._connection()

        async def predict() -> None:
            texts = self._chance.choices(range(len(self._answers.texts)), k=_TEXTS_PER_REQUEST)
            name = self._chance.choice(_NAMES)
            seconds = await self._predict(connection, name, texts)
            # Not before: a sample takes the list away.
            self._latencies.append(seconds)

        return predict

    def _uploader(self) -> Callable[[], object]:
        connection = self._connection()
        names = [f"changed-{number}" for number in range(_CHANGED)]
        uploaded = dict.fromkeys(names, 0)

        async def upload() -> None:
            name = names[self.uploads % len(names)]
            if uploaded[name] == _DELETED_AFTER:
                answer = await connection.ask(
                    "DELETE", f"/v1/adapters/{name}", seconds=PATIENCE_SECONDS
                )
                self.deletes += 1
                uploaded[name] = 0
                if answer.status != 204:
                    self.faults.append(f"DELETE {name}: {answer.status} {answer.body}")
            await self._put(connection, name)
            uploaded[name] += 1
            self.uploads += 1
            # It serves what was uploaded, at once.
            await self._predict(
                connection, name, [self._chance.randrange(len(self._answers.texts))]
            )

        return upload

    async def _put(self, connection: Connection, name: str) -> Version:
        version = self._answers.version(replaces=name)
        kind = "application/octet-stream"
        answer = await connection.ask(
            "PUT", f"/v1/adapters/{name}", version.file, seconds=PATIENCE_SECONDS, kind=kind
        )
        if answer.status not in (200, 201):
            self.faults.append(f"PUT {name}: {answer.status} {str(answer.body)[:200]}")
        return version

    async def _predict(self, connection: Connection, name: str, texts: list[int]) -> float:
        """Returns the seconds that it took."""
        content = json.dumps(self._answers.body(name, texts)).encode()
        began = time.monotonic()
        try:
            answer = await connection.ask("POST", "/v1/predict", content, seconds=PATIENCE_SECONDS)
        except (Cut, NotConnected, Silent) as error:
            self.faults.append(f"predict {name}: {error!r}")
            return time.monotonic() - began
        seconds = time.monotonic() - began
        outcome, detail = judge(self._answers, answer, texts)
        if outcome == "right":
            self.texts += len(texts)
        else:
            self.faults.append(f"predict {name}: {outcome} {detail}")
        return seconds

    def _sampler(self) -> Callable[[], object]:
        def sample() -> None:
            at = time.monotonic() - self._began
            sums = {"memory": 0.0, "descriptors": 0.0, "threads": 0.0}
            for name, pid in self._service.processes().items():
                process = Path(f"/proc/{pid}")
                memory = _private_mib(process)
                self._add(f"memory of {name}", "memory, MiB", at, memory)
                sums["memory"] += memory
                sums["descriptors"] += len(list((process / "fd").iterdir()))
                sums["threads"] += len(list((process / "task").iterdir()))
            self._add("descriptors, all processes", "descriptors", at, sums["descriptors"])
            self._add("threads, all processes", "threads", at, sums["threads"])
            latencies, self._latencies = sorted(self._latencies), []
            if latencies:
                self._add("latency p50", "latency p50, ms", at, 1000 * median(latencies))

        return sample

    def _add(self, name: str, unit: str, at: float, value: float) -> None:
        self.lines.setdefault(name, Line(name, unit)).values.append((at, value))

    def _connection(self) -> Connection:
        return Connection("127.0.0.1", self._service.port)


def _private_mib(process: Path) -> float:
    """Memory that no file backs and no other process has, and a share of what is shared."""
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def table(soak: Soak) -> str:
    """In Markdown: what was done, and how much every line grew."""
    lines = [
        f"{soak.texts:,} predictions, {soak.uploads:,} uploads, {soak.deletes} deletions, "
        f"{len(soak.faults)} faults.",
        "",
        "| what | after the warm-up | at the end | growth | allowed | |",
        "|---|---|---|---|---|---|",
    ]
    for line in soak.lines.values():
        settled = [value for _, value in line.settled()]
        tenth = max(1, len(settled) // 10)
        first, last = median(settled[:tenth]), median(settled[-tenth:])
        lines.append(
            f"| {line.name} | {first:,.1f} | {last:,.1f} | {line.growth():+.1f} | "
            f"{line.allowed:.1f} | {'flat' if line.flat else 'GROWS'} |"
        )
    return "\n".join(lines)


def write_plot(lines: Sequence[Line], path: Path) -> None:
    """A small plot for each unit, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "soak"
    from matplotlib import pyplot

    units = list(BOUNDS)
    figure, axes = pyplot.subplots(len(units), 1, figsize=(8, 9), sharex=True)
    for axis, unit in zip(axes, units, strict=True):
        for line in lines:
            if line.unit == unit:
                times, values = zip(*line.values, strict=True)
                axis.plot(times, values, linewidth=1, label=line.name)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="lower right")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


async def _run(arguments: Namespace) -> Soak:
    backbone = load_backbone(arguments.backbone, device="cpu")
    answers = Answers(backbone, dtype="float32", seed=7, texts=40)
    environment = {"IDSPAM_BACKBONE": str(arguments.backbone), "IDSPAM_DTYPE": "float32"}
    with tempfile.TemporaryDirectory(prefix="idspam-soak-") as folder:
        service = Service(Path(folder), workers=arguments.workers, environment=environment)
        await service.start()
        try:
            soak = Soak(service, answers, arguments)
            await soak.run()
            await service.terminate()
        finally:
            if service.running:
                await service.kill()
    return soak


def main() -> int:
    """0 if every line is flat and every answer was right."""
    parser = ArgumentParser(prog="python -m chaos.soak", description=__doc__)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=600, help="default: %(default)g")
    parser.add_argument("--uploads", type=int, default=2_000, help="default: %(default)s")
    parser.add_argument(
        "--predictions", type=int, default=200_000, help="texts, in requests of 32; default: 200000"
    )
    parser.add_argument("--plot", type=Path, help="where to write the plot, as SVG")
    arguments = parser.parse_args()
    soak = asyncio.run(_run(arguments))
    sys.stdout.write(f"{table(soak)}\n")
    if arguments.plot is not None:
        write_plot(list(soak.lines.values()), arguments.plot)
    for fault in soak.faults[:10]:
        sys.stderr.write(f"soak: {fault}\n")
    complete = soak.uploads >= arguments.uploads and soak.texts >= arguments.predictions
    if not complete:
        sys.stderr.write("soak: the machine was too slow for all of it\n")
    flat = all(line.flat for line in soak.lines.values())
    return 0 if flat and not soak.faults else 1


if __name__ == "__main__":
    sys.exit(main())
