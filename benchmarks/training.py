"""An epoch of this project's training beside one of PEFT's prompt tuning and one of PEFT's LoRA.

The same texts, batches, order and device, in turns; the memory of each in a process of its own.
Words and labels are random: this measures speed and memory, not quality.
"""

import asyncio
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from adapters.backbone.loading import load_backbone, resolve_device
from adapters.backbone.model import Backbone
from benchmarks.arguments import add_backbone_argument, at_least
from benchmarks.packed_training import Packed, PackedTrainee, losses_beside_plain
from benchmarks.padded_training import Kind, Padded, PaddedTrainee, load_classifier, precisions
from benchmarks.report import BenchmarkFailed, Report, progress, spread
from benchmarks.shapes import described, located
from benchmarks.training_memory import Memory, Trainee, memory_of
from benchmarks.turns import ratio, take_turns
from benchmarks.work import MAX_TOKENS, Work, make_work
from train.config.settings import CacheMode, ComputeType
from train.loop.encoded_splits import encode

CACHED = Packed("idspam", CacheMode.MEMORY)
ON_DISK = Packed("idspam", CacheMode.DISK)
UNCACHED = Packed("idspam")
WITH_VECTORS, VECTORS = Packed("idspam+vectors"), Packed("vectors")
# The rivals' methods in our batches show how much of the difference is due to packing.
OURS = (
    *(CACHED, ON_DISK, UNCACHED),
    *(WITH_VECTORS, VECTORS, Packed("prompt-tuning"), Packed("lora")),
)
# The same, launched kernel by kernel: only a GPU has graphs.
WITHOUT_GRAPHS = tuple(
    replace(system, graphs=False) for system in (CACHED, WITH_VECTORS, Packed("lora"))
)

# How far packing, the order of sums and a cached trunk may move a mean loss.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_CHECKED_ROWS = 16
# A backbone with wider states than this gets fewer rows on a CPU.
_WIDE = 512
_COLUMNS = (
    "system",
    "s an epoch",
    "texts/s",
    "x PEFT prompt tuning",
    "x PEFT LoRA",
    "s to fill, once",
    "peak MiB",
    "of PEFT LoRA's",
    "beside the model",
    "of PEFT LoRA's",
)


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one system.

    texts_per_second: by round. first_loss: in its first epoch. fill_seconds: filling its cache,
    once and outside the epochs. memory: bytes.
    """

    texts_per_second: Sequence[float]
    first_loss: float
    fill_seconds: float
    memory: Memory


def add_arguments(parser: ArgumentParser) -> None:
    add_backbone_argument(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype",
        type=ComputeType,
        choices=[ComputeType.FLOAT32, ComputeType.BFLOAT16],
        help="of all systems; by default bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--method",
        action="append",
        choices=list(dict.fromkeys(system.method for system in OURS)),
        help="of ours; may be repeated; default: all",
    )
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument(
        "--rows",
        type=at_least(_CHECKED_ROWS),
        help="texts of an epoch; by default 1024 on a GPU, 128 on a CPU, 64 there if it is wide",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument(
        "--mean-tokens", type=at_least(4), help="of a text; by default 39 on a GPU, 26 on a CPU"
    )


def run(options: Namespace) -> Report:
    """
    Raises:
        BenchmarkFailed: PEFT is not installed, a rival does not learn, or our training computes
            something else than the plain model.
    """
    if find_spec("peft") is None:
        raise BenchmarkFailed("PEFT is not installed: this benchmark compares with it")
    target = resolve_device(options.device)
    gpu = target.type == "cuda"
    with TemporaryDirectory(prefix="idspam-shape-") as folder:
        source = located(options.backbone, Path(folder))
        progress(f"loading {described(options.backbone)}")
        dtype = options.dtype or (ComputeType.BFLOAT16 if gpu else ComputeType.FLOAT32)
        frozen = load_backbone(source, device=str(target), dtype=dtype)
        work = make_work(
            source,
            device=target,
            dtype=dtype,
            rows=options.rows or (1024 if gpu else 64 if frozen.hidden_size > _WIDE else 128),
            mean_tokens=options.mean_tokens or (39 if gpu else 26),
            batch_size=options.batch_size,
        )
        rivals = [Padded(kind, precision) for kind in Kind for precision in precisions(dtype)]
        ours = [
            system
            for system in (*OURS, *(WITHOUT_GRAPHS if gpu else ()))
            if options.method in (None, []) or system.method in options.method
        ]
        figures, checks = _figures(work, frozen, ours, rivals, rounds=options.rounds)
    conditions = {"backbone": described(options.backbone)}
    conditions |= _conditions(work, frozen, options.rounds) | checks
    return Contest(len(work.texts), figures, rivals, gpu=gpu).report(conditions)


def _figures(
    work: Work,
    frozen: Backbone,
    ours: Sequence[Packed],
    rivals: Sequence[Padded],
    *,
    rounds: int,
) -> tuple[dict[str, Figures], dict[str, str]]:
    """The figures of all systems by name, and what was checked."""
    checks = {"loss of ID-SPAM": _check_loss(work, frozen)}
    with ExitStack() as stack:
        packed = {system.name: PackedTrainee(work, system, frozen) for system in ours}
        for trainee in packed.values():
            stack.callback(trainee.close)
        theirs = {
            system.name: PaddedTrainee(work, system, load_classifier(work, system))
            for system in rivals
        }
        for name, rival in theirs.items():
            checks[f"loss of {name}"] = check_learned(name, rival)
        trainees: dict[str, Trainee] = {**packed, **theirs}
        # An epoch of ours to capture graphs in, beside the one that warms all up.
        losses = {
            name: [trainee.epoch().loss] if name in packed else []
            for name, trainee in trainees.items()
        }
        measures = {
            name: partial(_epoch, trainee, len(work.texts), losses[name])
            for name, trainee in trainees.items()
        }
        measured = asyncio.run(take_turns(measures, rounds=rounds))
    _check_losses(losses, frozen.dtype)
    fills = {name: trainee.seconds for name, trainee in packed.items()}
    memory = memory_of((*ours, *rivals), work)
    return {
        name: Figures(rates, losses[name][0], fills.get(name, 0.0), memory[name])
        for name, rates in measured.items()
    }, checks


async def _epoch(trainee: Trainee, rows: int, losses: list[float]) -> float:
    epoch = trainee.epoch()
    losses.append(epoch.loss)
    return rows / epoch.seconds


def _check_loss(work: Work, frozen: Backbone) -> str:
    """Check that our training computes what the plain model does."""
    few = replace(work, texts=work.texts[:_CHECKED_ROWS], labels=work.labels[:_CHECKED_ROWS])
    ours, plain = losses_beside_plain(few, frozen)
    if not abs(ours - plain) <= TOLERANCES[frozen.dtype]:
        raise BenchmarkFailed(f"ID-SPAM's loss is {ours}, padded and by plain transformers {plain}")
    return f"{ours:.4f}; the same weights padded, by plain transformers: {plain:.4f}"


def check_learned(name: str, rival: PaddedTrainee) -> str:
    """The table's line about a rival's loss.

    Raises:
        BenchmarkFailed: it does not fall.
    """
    before, after = rival.learned()
    if not after < before < math.inf:
        raise BenchmarkFailed(f"{name} does not learn: its loss goes from {before} to {after}")
    return f"of a few rows, before and after a few steps: {before:.4f}, {after:.4f}"


def _check_losses(losses: Mapping[str, Sequence[float]], dtype: torch.dtype) -> None:
    """Check that all losses are finite, and that the kind of cache does not change them."""
    for name, values in losses.items():
        if not np.isfinite(values).all():
            raise BenchmarkFailed(f"{name}: a loss is not finite")
    kinds = (CACHED, ON_DISK, UNCACHED)
    first = [losses[system.name][0] for system in kinds if system.name in losses]
    if first and not max(first) - min(first) <= TOLERANCES[dtype]:
        raise BenchmarkFailed(f"cached in memory, on disk and not at all, the losses are {first}")


def _conditions(work: Work, frozen: Backbone, rounds: int) -> dict[str, Any]:
    lengths = np.array([len(encoding) for encoding in encode(frozen, work.dataset(), MAX_TOKENS)])
    padded = sum(len(rows) * int(lengths[rows].max()) for rows in work.batches())
    return {
        "device": work.device,
        "dtype": str(work.dtype),
        "texts": f"{len(lengths)}, mean {lengths.mean():.1f} tokens, longest {lengths.max()}",
        "batches": f"{work.batch_size} texts in random order, "
        f"{lengths.sum() / padded:.2f} of a padded batch is text",
        "rounds": f"{rounds} after one that warms up, medians; ratios within rounds",
    }


@dataclass(frozen=True, slots=True)
class Contest:
    """The figures of all systems by name, from the same rounds over the same rows.

    A rival that ran in several precisions is compared in its fastest one, and its memory in the one
    that takes least. gpu: whether it was on one.
    """

    rows: int
    figures: Mapping[str, Figures]
    rivals: Sequence[Padded]
    gpu: bool

    def report(self, conditions: Mapping[str, Any]) -> Report:
        """The table, its figures, and the targets of the systems that ran."""
        systems = {name: self._system(name) for name in self.figures}
        prompt_tuning, lora = (5.0, 6.0) if self.gpu else (3.0, 2.0)
        wanted = {
            "kept in memory over PEFT prompt tuning, at least": (
                prompt_tuning,
                CACHED,
                "times_prompt_tuning",
            ),
            "kept in memory over PEFT LoRA, at least": (lora, CACHED, "times_lora"),
            "uncached over PEFT prompt tuning, at least": (1.5, UNCACHED, "times_prompt_tuning"),
            "peak memory of PEFT LoRA's, kept in memory, at most": (0.5, CACHED, "peak_of_loras"),
        }
        for system in (WITH_VECTORS, VECTORS):
            least = 2.0 if self.gpu else 5.0
            wanted[f"{system.name} over PEFT LoRA, at least"] = (least, system, "times_lora")
        targets = {
            name: (value, systems[system.name][figure])
            for name, (value, system, figure) in wanted.items()
            if system.name in systems
        }
        content = {
            "systems": systems,
            "targets": {
                name: {"wanted": wanted, "measured": measured}
                for name, (wanted, measured) in targets.items()
            },
        }
        lines = {
            f"target: {name}": f"{wanted:g} wanted, {measured:.2f} measured"
            for name, (wanted, measured) in targets.items()
        }
        rows = [_row(name, system) for name, system in systems.items()]
        return Report("training", _COLUMNS, rows, content, {**conditions, **lines})

    def _system(self, name: str) -> dict[str, Any]:
        figures = self.figures[name]
        memory = figures.memory
        loras = [self.figures[rival].memory for rival in self._names(Kind.LORA)]
        return {
            "seconds_per_epoch": spread([self.rows / rate for rate in figures.texts_per_second]),
            "texts_per_second": spread(figures.texts_per_second),
            "times_prompt_tuning": self._times(name, Kind.PROMPT_TUNING),
            "times_lora": self._times(name, Kind.LORA),
            "fill_seconds": figures.fill_seconds,
            "first_loss": figures.first_loss,
            "memory_bytes": asdict(memory) | {"above": memory.above},
            "peak_of_loras": memory.peak / min(lora.peak for lora in loras),
            "above_of_loras": memory.above / min(lora.above for lora in loras),
        }

    def _times(self, name: str, kind: Kind) -> float:
        """The speed over that of a rival in its fastest precision."""
        rates = [self.figures[rival].texts_per_second for rival in self._names(kind)]
        return ratio(self.figures[name].texts_per_second, max(rates, key=median))

    def _names(self, kind: Kind) -> list[str]:
        return [rival.name for rival in self.rivals if rival.kind is kind]


def _row(name: str, system: Mapping[str, Any]) -> list[str]:
    memory, rate = system["memory_bytes"], system["texts_per_second"]["median"]
    return [
        name,
        f"{system['seconds_per_epoch']['median']:.2f}",
        f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
        f"{system['times_prompt_tuning']:.2f}",
        f"{system['times_lora']:.2f}",
        f"{system['fill_seconds']:.2f}" if system["fill_seconds"] else "-",
        f"{memory['peak'] >> 20:,}",
        f"{system['peak_of_loras']:.2f}",
        f"{memory['above'] >> 20:,}",
        f"{system['above_of_loras']:.2f}",
    ]
