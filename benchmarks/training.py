"""One training epoch over kept lower layers against the same epoch that computes them every time.

Same rows, order, seeds and adapter; what differs is the cache alone. Texts are random words: speed,
not quality.
"""

import random
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from adapters.loading import DEFAULT_BACKBONE
from benchmarks.arguments import at_least
from benchmarks.report import Report, spread
from benchmarks.shapes import described
from benchmarks.texts import make_texts, words_of
from benchmarks.turns import ratio
from train.data import Dataset, Example
from train.progress import SilentProgress
from train.report import FitReport
from train.settings import CacheMode, FitSettings
from train.trainer import fit

ROWS = 1000
MEAN_TOKENS = 26


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--device", default="auto")


def run(*, rounds: int, device: str) -> Report:
    """Seconds an epoch by cache mode, in turns, and what filling the cache takes once."""
    data = _data()
    reports: dict[CacheMode, list[FitReport]] = {}
    modes = (CacheMode.OFF, CacheMode.MEMORY, CacheMode.DISK)
    for _ in range(rounds):
        for mode in modes:
            reports.setdefault(mode, []).append(_fit(data, mode, device))
    rows, figures = [], {}
    for mode, made in reports.items():
        epochs = [report.epochs[-1].seconds for report in made]
        seconds = spread(epochs)
        times = ratio([one.epochs[-1].seconds for one in reports[CacheMode.OFF]], epochs)
        fill = spread([float(report.cache["seconds"]) for report in made])
        figures[mode.value] = {
            "seconds_per_epoch": seconds,
            "times_faster_than_off": times,
            "fill_seconds": fill,
        }
        rows.append(
            [
                mode.value,
                f"{seconds['median']:.2f}",
                f"{ROWS / seconds['median']:,.0f}",
                f"{times:.2f}",
                f"{fill['median']:.2f}",
            ]
        )
    columns = ("cache", "s an epoch", "texts/s", "x off", "s to fill, once")
    conditions = {
        "backbone": described(DEFAULT_BACKBONE),
        "device": device,
        "texts": f"{ROWS}, mean {MEAN_TOKENS} tokens",
        "rounds": f"{rounds}, medians",
    }
    return Report("training", columns, rows, figures, conditions)


def _data() -> Dataset:
    texts = make_texts(words_of(DEFAULT_BACKBONE), count=ROWS, mean_tokens=MEAN_TOKENS)
    rng = random.Random(0)
    examples = tuple(Example(text, None, rng.choice(("no", "yes"))) for text in texts)
    return Dataset("random words", "0" * 64, examples)


def _fit(data: Dataset, mode: CacheMode, device: str) -> FitReport:
    """Two epochs; the second is the one that is timed, when nothing is new to the allocator."""
    settings = FitSettings(epochs=2, patience=2, cache=mode, device=device, validation_fraction=0.0)
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            data, None, None, settings, Path(folder) / "adapter.safetensors", SilentProgress()
        )
