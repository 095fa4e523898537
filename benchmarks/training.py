"""One training epoch over kept lower layers against the same epoch that computes them every time.

Same rows, order, seeds and adapter; what differs is the cache alone. Texts are random words: speed,
not quality.
"""

import random
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from adapters.loading import locate_default
from benchmarks.load import make_texts
from benchmarks.report import show, spread, write
from train.data import Dataset, Example
from train.progress import SilentProgress
from train.report import FitReport
from train.settings import CacheMode, FitSettings
from train.trainer import fit

ROWS = 1000
MEAN_TOKENS = 26


def training(*, rounds: int, device: str, json: Path | None) -> None:
    """Seconds an epoch by cache mode, in turns, and what filling the cache takes once."""
    data = _data()
    reports: dict[CacheMode, list[FitReport]] = {}
    modes = (CacheMode.OFF, CacheMode.MEMORY, CacheMode.DISK)
    for _ in range(rounds):
        for mode in modes:
            reports.setdefault(mode, []).append(_fit(data, mode, device))
    rows, figures = [], {}
    for mode, made in reports.items():
        seconds = spread([report.epochs[-1].seconds for report in made])
        ratios = [
            one.epochs[-1].seconds / other.epochs[-1].seconds
            for one, other in zip(reports[CacheMode.OFF], made, strict=True)
        ]
        fill = spread([float(report.cache["seconds"]) for report in made])
        figures[mode.value] = {
            "seconds_per_epoch": seconds,
            "times_faster_than_off": spread(ratios),
            "fill_seconds": fill,
        }
        rows.append(
            [
                mode.value,
                f"{seconds['median']:.2f}",
                f"{ROWS / seconds['median']:,.0f}",
                f"{spread(ratios)['median']:.2f}",
                f"{fill['median']:.2f}",
            ]
        )
    columns = ("cache", "s an epoch", "texts/s", "x off", "s to fill, once")
    show(f"training: {ROWS} texts, mean {MEAN_TOKENS} tokens, {rounds} rounds", columns, rows)
    write(json, {"rows": ROWS, "mean_tokens": MEAN_TOKENS, "rounds": rounds, "figures": figures})


def _data() -> Dataset:
    source, revision = locate_default()
    vocabulary = AutoTokenizer.from_pretrained(source, revision=revision).get_vocab()
    texts = make_texts(vocabulary, count=ROWS, mean_tokens=MEAN_TOKENS)
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
