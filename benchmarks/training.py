"""An epoch of this project's training beside one of PEFT's prompt tuning and one of PEFT's LoRA.

The same texts, batches, order and device, in turns; memory of each in a process of its own. Words
and labels are random: speed and memory, not quality.
"""

import asyncio
import math
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone, resolve_device
from adapters.backbone.model import Backbone
from benchmarks.arguments import at_least
from benchmarks.epochs import MAX_TOKENS, Trainee, Work, make_work
from benchmarks.packed_training import Packed, PackedTrainee, losses_beside_plain
from benchmarks.padded_training import Kind, Padded, PaddedTrainee, load_classifier, precisions
from benchmarks.report import BenchmarkFailed, Report, progress
from benchmarks.shapes import SHAPES, described, located
from benchmarks.training_figures import Contest, Figures
from benchmarks.training_memory import memory_of
from benchmarks.turns import Measure, take_turns
from train.config.settings import CacheMode, ComputeType
from train.loop.encoded_splits import encode

CACHED = Packed("idspam", CacheMode.MEMORY)
ON_DISK = Packed("idspam", CacheMode.DISK)
UNCACHED = Packed("idspam")
# And the rivals' methods in our batches: what of the difference is packing's, not ID-SPAM's.
OURS = (CACHED, ON_DISK, UNCACHED, Packed("prompt-tuning"), Packed("lora"))

# By how much packing, the order of sums and a kept trunk may move a mean loss.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_CHECKED_ROWS = 16
_WIDE = 512


def add_arguments(parser: ArgumentParser) -> None:
    shapes = ", ".join(SHAPES)
    parser.add_argument(
        "--backbone",
        default=DEFAULT_BACKBONE,
        help=f"a folder, a name, or a shape that gets random weights: {shapes}",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype",
        type=ComputeType,
        choices=[ComputeType.FLOAT32, ComputeType.BFLOAT16],
        help="of everybody; else bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument(
        "--rows",
        type=at_least(_CHECKED_ROWS),
        help="texts of an epoch; else 512 on a GPU, 128 on a CPU, there 64 of a wide backbone",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument(
        "--mean-tokens", type=at_least(4), help="of a text; else 39 on a GPU, 26 on a CPU"
    )


def run(
    *,
    backbone: str,
    device: str,
    dtype: ComputeType | None,
    rounds: int,
    rows: int | None,
    batch_size: int,
    mean_tokens: int | None,
) -> Report:
    """
    Raises:
        BenchmarkFailed: PEFT is not installed, somebody does not learn, or ours computes something
            else than it must.
    """
    if find_spec("peft") is None:
        raise BenchmarkFailed("PEFT is not installed: this compares with it (the extra `bench`)")
    target = resolve_device(device)
    gpu = target.type == "cuda"
    with TemporaryDirectory(prefix="idspam-shape-") as folder:
        source = located(backbone, Path(folder))
        progress(f"loading {described(backbone)}")
        dtype = dtype or (ComputeType.BFLOAT16 if gpu else ComputeType.FLOAT32)
        frozen = load_backbone(source, device=str(target), dtype=dtype)
        work = make_work(
            source,
            device=target,
            dtype=dtype,
            rows=rows or (512 if gpu else 64 if frozen.hidden_size > _WIDE else 128),
            mean_tokens=mean_tokens or (39 if gpu else 26),
            batch_size=batch_size,
        )
        rivals = [Padded(kind, precision) for kind in Kind for precision in precisions(dtype)]
        figures, checks = _figures(work, frozen, rivals, rounds=rounds)
    conditions = {"backbone": described(backbone)} | _conditions(work, frozen, rounds) | checks
    return Contest(len(work.texts), figures, rivals, CACHED, UNCACHED).report(conditions)


def _figures(
    work: Work, frozen: Backbone, rivals: Sequence[Padded], *, rounds: int
) -> tuple[dict[str, Figures], dict[str, str]]:
    """Everybody's figures by name, and what was checked."""
    checks = {"loss of ID-SPAM": _check_loss(work, frozen)}
    with ExitStack() as stack:
        ours = {system.name: _packed(work, system, frozen) for system in OURS}
        for trainee in ours.values():
            stack.callback(trainee.close)
        theirs = {
            system.name: PaddedTrainee(work, system, load_classifier(work, system))
            for system in rivals
        }
        for name, rival in theirs.items():
            checks[f"loss of {name}"] = check_learned(name, rival)
        trainees: dict[str, Trainee] = {**ours, **theirs}
        losses: dict[str, list[float]] = {name: [] for name in trainees}
        measures = {
            name: _measure(trainee, len(work.texts), losses[name])
            for name, trainee in trainees.items()
        }
        measured = asyncio.run(take_turns(measures, rounds=rounds))
    _check_losses(losses, frozen.dtype)
    fills = {name: trainee.seconds for name, trainee in ours.items()}
    memory = memory_of((*OURS, *rivals), work)
    return {
        name: Figures(rates, losses[name][0], fills.get(name, 0.0), memory[name])
        for name, rates in measured.items()
    }, checks


def _packed(work: Work, system: Packed, frozen: Backbone) -> PackedTrainee:
    if system.needs_its_own_backbone:
        own = load_backbone(work.source, device=work.device, dtype=work.dtype)
        return PackedTrainee(work, system, own)
    return PackedTrainee(work, system, frozen)


def _measure(trainee: Trainee, rows: int, losses: list[float]) -> Measure:
    async def measure() -> float:
        epoch = trainee.epoch()
        losses.append(epoch.loss)
        return rows / epoch.seconds

    return measure


def _check_loss(work: Work, frozen: Backbone) -> str:
    """What is timed computes what the plain model does."""
    few = replace(work, texts=work.texts[:_CHECKED_ROWS], labels=work.labels[:_CHECKED_ROWS])
    ours, plain = losses_beside_plain(few, frozen)
    if not abs(ours - plain) <= TOLERANCES[frozen.dtype]:
        raise BenchmarkFailed(f"ID-SPAM's loss is {ours}, padded and by plain transformers {plain}")
    return f"{ours:.4f}; the same weights padded, by plain transformers: {plain:.4f}"


def check_learned(name: str, rival: PaddedTrainee) -> str:
    """What the table says of a rival's loss.

    Raises:
        BenchmarkFailed: it does not fall.
    """
    before, after = rival.learned()
    if not after < before < math.inf:
        raise BenchmarkFailed(f"{name} does not learn: its loss goes from {before} to {after}")
    return f"of a few rows, before a few steps and after: {before:.4f}, {after:.4f}"


def _check_losses(losses: Mapping[str, Sequence[float]], dtype: torch.dtype) -> None:
    """All are finite, and where lower layers are kept changes nothing."""
    for name, found in losses.items():
        if not np.isfinite(found).all():
            raise BenchmarkFailed(f"{name}: a loss is not finite")
    first = [losses[system.name][0] for system in (CACHED, ON_DISK, UNCACHED)]
    if not max(first) - min(first) <= TOLERANCES[dtype]:
        raise BenchmarkFailed(f"kept in memory, on disk and uncached lose {first}: not the same")


def _conditions(work: Work, frozen: Backbone, rounds: int) -> dict[str, Any]:
    lengths = np.array([len(item) for item in encode(frozen, work.dataset(), MAX_TOKENS)])
    padded = sum(len(chosen) * int(lengths[chosen].max()) for chosen in work.batches())
    return {
        "device": work.device,
        "dtype": str(work.dtype),
        "texts": f"{len(lengths)}, mean {lengths.mean():.1f} tokens, longest {lengths.max()}",
        "batches": f"{work.batch_size} texts in random order, "
        f"{lengths.sum() / padded:.2f} of a padded batch is text",
        "rounds": f"{rounds} after one that warms up, medians; ratios within rounds",
    }
