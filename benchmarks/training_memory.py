"""What each system of `training` holds at most, each measured in a process of its own."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeAlias

import torch

from adapters.backbone.loading import load_backbone
from benchmarks.epochs import Trainee, Work
from benchmarks.packed_training import Packed, PackedTrainee
from benchmarks.padded_training import Padded, PaddedTrainee, load_classifier
from benchmarks.report import BenchmarkFailed, progress
from train.loop.memory import peak_memory, reset_peak

System: TypeAlias = Packed | Padded

_GPU_PROCESSES = 5


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, as `train.loop.memory` counts them. loaded: with the model on its device and nothing else.
    peak: the most from then on, over set-up, cache and one epoch."""

    loaded: int
    peak: int

    @property
    def above(self) -> int:
        """What training took beside the model and, on a CPU, beside the libraries."""
        return self.peak - self.loaded


def memory_of(systems: Sequence[System], work: Work) -> Mapping[str, Memory]:
    """By name.

    Raises:
        BenchmarkFailed: a process was killed, most likely for its memory.
    """
    gpu = torch.device(work.device).type == "cuda"
    # Side by side where a process counts its own tensors alone and cores are plenty. A CPU's start
    # from one that has imported everything; with a GPU nothing may be forked.
    context = get_context("spawn" if gpu else "forkserver")
    if not gpu:
        context.set_forkserver_preload([__name__])
    found = {}
    with ProcessPoolExecutor(
        _GPU_PROCESSES if gpu else 1, mp_context=context, max_tasks_per_child=1
    ) as pool:
        made = pool.map(partial(_memory, work=work), systems)
        try:
            for system, memory in zip(systems, made, strict=True):
                progress(f"memory: {system.name}: {memory.peak >> 20:,} MiB")
                found[system.name] = memory
        except BrokenProcessPool:
            raise BenchmarkFailed("a process that measured memory was killed") from None
    return found


def _memory(system: System, work: Work) -> Memory:
    device = torch.device(work.device)
    start = _loaded(system, work)
    reset_peak(device)
    before = peak_memory(device)
    trainee = start()
    trainee.epoch()
    after = peak_memory(device)
    trainee.close()
    return Memory(loaded=before, peak=after)


def _loaded(system: System, work: Work) -> Callable[[], Trainee]:
    """What sets the system up, its model already on the device."""
    if isinstance(system, Packed):
        return partial(
            PackedTrainee,
            work,
            system,
            load_backbone(work.source, device=work.device, dtype=work.dtype),
        )
    return partial(PaddedTrainee, work, system, load_classifier(work, system))
