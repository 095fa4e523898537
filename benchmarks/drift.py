"""How often drift is reported without and with it, and what counting a text costs: docs/drift.md.

    python -m benchmarks.drift --data-root runs/data

The answers of adapters of the zoo to test texts of two data sets, which they were not trained on,
are dealt into a profile and many small streams of traffic. Nothing is served: the counts and the
comparison are those of the service.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time, time

from adapters.adapter import PreparedAdapter, prepare
from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone
from adapters.format.files import load_adapter
from adapters.profiles import QUANTITIES, Bins, Ids, Scores, counts_of, profile_of
from adapters.tokenizer import Encoding
from service.drift.monitor import LEAST_TEXTS, DriftMonitor
from service.drift.shift import Level, shift_of
from service.drift.uncertain import UncertainTexts
from service.engine.interface import AdapterKey, Entry, RowResult
from service.engine.observer import Observer
from train.data.dataset import Dataset, read_examples
from train.loop.encoded_splits import encode
from train.loop.progress import Progress
from train.report.evaluation import served_scores

SEED = 15
RUNS = 200
SIZES = (100, 300, 1000, 2000)
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
# The adapter, its data, what foreign texts are, and the rows of its profile.
CASES = (
    ("banking77", "banking77", "clinc150", 1000),
    ("clinc150", "clinc150", "banking77", 1000),
    ("sms-spam", "sms_spam", "banking77", 500),
)


@dataclass(frozen=True, slots=True)
class Answered:
    """A text as an adapter has answered it."""

    scores: Scores
    input_ids: Ids


class Case:
    """One adapter, texts of its own kind, and foreign ones."""

    def __init__(
        self, adapter: PreparedAdapter, backbone: Backbone, own: Dataset, foreign: Dataset
    ) -> None:
        self.spec = adapter.spec
        self.unknown_id = backbone.encoder.unknown_id
        self.own = _answered(adapter, backbone, own)
        self.foreign = _answered(adapter, backbone, foreign)
        self._random = random.Random(SEED)

    def levels(self, rows: int, size: int, share: float) -> dict[str, Level]:
        """The levels by quantity of one stream, of which a share is foreign."""
        chosen = self._random.sample(self.own, rows + size - round(share * size))
        held_out, traffic = chosen[:rows], chosen[rows:]
        traffic += self._random.sample(self.foreign, round(share * size))
        texts = [(each.scores, each.input_ids) for each in held_out]
        profile = profile_of(self.spec, texts, unknown_id=self.unknown_id, source="given")
        bins = Bins.of_profile(self.spec, profile, self.unknown_id)
        counts = [0] * bins.starts[-1]
        for each in traffic:
            for at in bins.of_text(each.scores, each.input_ids):
                counts[at] += 1
        reference = counts_of(profile)
        return {
            quantity: shift_of(
                reference[quantity],
                counts[bins.starts[at] : bins.starts[at + 1]],
                ordered=quantity != "label",
            ).level
            for at, quantity in enumerate(QUANTITIES)
        }


def _answered(adapter: PreparedAdapter, backbone: Backbone, data: Dataset) -> list[Answered]:
    encodings = encode(backbone, data, adapter.spec.max_length)
    scores = served_scores(adapter, backbone, encodings, Progress()).numpy()
    return [
        Answered(row, encoding.input_ids) for row, encoding in zip(scores, encodings, strict=True)
    ]


def table(case: Case, rows: int, runs: int) -> list[str]:
    """The share of streams with any quantity moderate or large, and with one that is large."""
    lines = ["| foreign texts | " + " | ".join(f"{size:,} texts" for size in SIZES) + " |"]
    lines.append("|---|" + "---|" * len(SIZES))
    for share in (0.0, *SHARES):
        cells = []
        for size in SIZES:
            if rows + size - round(share * size) > len(case.own) or size > len(case.foreign):
                cells.append("-")
                continue
            levels = [set(case.levels(rows, size, share).values()) for _ in range(runs)]
            any_shift = sum(each != {"stable"} for each in levels) / runs
            large = sum("large" in each for each in levels) / runs
            cells.append(f"{any_shift:.1%}, {large:.1%}")
        lines.append(f"| {share:.0%} | " + " | ".join(cells) + " |")
    return lines


def cost(case: Case, texts: int = 20_000) -> tuple[float, float]:
    """Microseconds of counting a text: one in a request, and 64 in a request."""
    held_out = [(each.scores, each.input_ids) for each in case.own[:500]]
    profile = profile_of(case.spec, held_out, unknown_id=case.unknown_id, source="given")
    spec = case.spec.model_copy(update={"profile": profile})
    uncertain = UncertainTexts(texts=0, max_bytes=0, seconds=0.0)
    monitor = DriftMonitor(Observer(), texts=4000, uncertain=uncertain)
    monitor.unknown_id = case.unknown_id
    monitor.follow("a", "1", {"1": spec})
    key = AdapterKey("a", "1")
    seconds = []
    for size in (1, 64):
        asked = [
            [case.own[(start + number) % len(case.own)] for number in range(size)]
            for start in range(0, texts, size)
        ]
        requests = [
            (
                [Entry(key, Encoding(each.input_ids, each.input_ids, False), 1) for each in some],
                [RowResult(each.scores) for each in some],
            )
            for some in asked
        ]
        started = process_time()
        for entries, rows in requests:
            monitor.answered(entries, rows)
        seconds.append((process_time() - started) / (size * len(requests)))
    return seconds[0] * 1e6, seconds[1] * 1e6


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="holds TASK/SPLIT.jsonl.gz")
    parser.add_argument("--zoo", type=Path, default=Path("adapters/zoo"))
    parser.add_argument("--backbone", default="all-MiniLM-L6-v2")
    parser.add_argument("--runs", type=int, default=RUNS, help="streams; default: %(default)s")
    parser.add_argument("--only", action="append", choices=[name for name, *_ in CASES])
    options = parser.parse_args(argv)
    backbone = load_backbone(options.backbone, device="cpu", dtype="float32")

    def texts(task: str) -> Dataset:
        return read_examples(str(options.data_root / task / "test.jsonl.gz"))

    started = time()
    for name, own, foreign, rows in CASES:
        if options.only and name not in options.only:
            continue
        adapter = prepare(load_adapter(options.zoo / f"{name}.safetensors"), backbone)
        case = Case(adapter, backbone, texts(own), texts(foreign))
        say(f"\n{name}, a profile of {rows:,} of its test texts; foreign: {foreign}")
        say(f"each cell: {options.runs} streams; any quantity moderate or large, one large\n")
        say("\n".join(table(case, rows, options.runs)))
        one, many = cost(case)
        say(f"\ncounting: {one:.1f} us a text alone in its request, {many:.1f} us among 64")
    say(f"\nfrom {LEAST_TEXTS} texts on; {time() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
