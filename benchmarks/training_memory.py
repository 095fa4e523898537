"""Peak memory of each system of `training`, measured in a process of its own."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeAlias

import torch

from adapters.backbone.loading import load_backbone
from benchmarks.packed_training import Packed, PackedTrainee
from benchmarks.padded_training import Padded, PaddedTrainee, load_classifier
from benchmarks.report import BenchmarkFailed, progress
from benchmarks.work import Work
from train.loop.memory import peak_memory, reset_peak

System: TypeAlias = Packed | Padded
# A system with its model on the device, ready to train.
Trainee: TypeAlias = PackedTrainee | PaddedTrainee

_GPU_PROCESSES = 5


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, as `train.loop.memory` counts them.

    loaded: with only the model on its device. peak: the most after that, over set-up, cache and one
    epoch.
    """

    loaded: int
    peak: int

    @property
    def above(self) -> int:
        """Memory of training without the model and, on a CPU, without the libraries."""
        return self.peak - self.loaded


def memory_of(systems: Sequence[System], work: Work) -> Mapping[str, Memory]:
    """The memory of each system, by name.

    Raises:
        BenchmarkFailed: a process was killed, most likely for its memory.
    """
    gpu = torch.device(work.device).type == "cuda"
    # On a GPU a process counts only its own tensors, so several run at once. On a CPU they are
    # forked from a process that has imported everything; CUDA does not survive a fork.
    context = get_context("spawn" if gpu else "forkserver")
    if not gpu:
        context.set_forkserver_preload([__name__])
    memory_by_name = {}
    with ProcessPoolExecutor(
        _GPU_PROCESSES if gpu else 1, mp_context=context, max_tasks_per_child=1
    ) as pool:
        results = pool.map(partial(_memory, work=work), systems)
        try:
            for system, memory in zip(systems, results, strict=True):
                progress(f"memory: {system.name}: {memory.peak >> 20:,} MiB")
                memory_by_name[system.name] = memory
        except BrokenProcessPool:
            raise BenchmarkFailed("a process that measured memory was killed") from None
    return memory_by_name


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
    """Sets the system up when called; its model is on the device already."""
    if isinstance(system, Packed):
        return partial(
            PackedTrainee,
            work,
            system,
            load_backbone(work.source, device=work.device, dtype=work.dtype),
        )
    return partial(PaddedTrainee, work, system, load_classifier(work, system))
