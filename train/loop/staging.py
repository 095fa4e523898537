"""All arrays that a step needs from the host, in one copy to a fixed place of the device.

A captured step reads its inputs where they were at the capture. So the arrays of every later step
of the same bucket, which have the same sizes in the same order, are written to the same places.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.packed.layout import Layout
from adapters.packed.packing import PackedBatch

# Arrays start at multiples of this many bytes.
_ALIGNMENT = 16
# What batches and layouts compute, and take to the device, when it is first read.
_ON_DEMAND = ("cumulative", "grid", "input_ids", "offsets", "shifts", "token_type_ids")


class Staging:
    """A place on the device for the arrays of a step.

    Args:
        nbytes: room for all of them, as `Measured` counts it.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._pinned = device.type == "cuda"
        self._there = torch.empty(nbytes, dtype=torch.uint8, device=device)
        # The kinds and places of the arrays, known once `seal` was called.
        self._known: list[tuple[torch.Size, torch.dtype]] = []
        self._views: list[Tensor] = []
        self._sealed = False
        self.begin()

    def begin(self) -> None:
        """Start with the arrays of another step."""
        # New memory every time: the device may not have read the last step's yet. PyTorch uses
        # pinned memory again only once the copies from it are done.
        self._here = torch.empty(len(self._there), dtype=torch.uint8, pin_memory=self._pinned)
        self._next = self._used = 0

    def put(self, values: Tensor) -> Tensor:
        """The place of the next array; it has these values after `copy`."""
        place = slice(self._used, self._used + values.nbytes)
        self._view(self._here, place, values).copy_(values)
        self._used += _room(values)
        index, self._next = self._next, self._next + 1
        if not self._sealed:
            self._known.append((values.shape, values.dtype))
            self._views.append(self._view(self._there, place, values))
        assert index < len(self._known), "a step of this bucket has more arrays than the others"
        known = self._known[index]
        assert known == (values.shape, values.dtype), f"array {index}: {values.shape}, not {known}"
        return self._views[index]

    def seal(self) -> None:
        """From now on all steps have the same arrays as the one that was staged last."""
        self._sealed = True

    def copy(self) -> None:
        """Take the arrays to the device, after what was launched before."""
        self._there.copy_(self._here, non_blocking=True)

    @staticmethod
    def _view(memory: Tensor, place: slice, like: Tensor) -> Tensor:
        return memory[place].view(like.dtype).view(like.shape)


@dataclass(slots=True)
class Measured:
    """Takes arrays to the device one by one. nbytes: what all of them take in a `Staging`."""

    device: torch.device
    nbytes: int = field(default=0, init=False)

    def put(self, values: Tensor) -> Tensor:
        self.nbytes += _room(values)
        return values.to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Demands:
    """Which arrays of a batch a step has read: for the batch and each of its layouts their names.

    A captured step reads them no more from Python, so they must be demanded before it runs.
    """

    names: tuple[tuple[str, ...], ...]

    @classmethod
    def on(cls, batch: PackedBatch) -> "Demands":
        """Of a step that has run with this batch."""
        return cls(
            tuple(
                tuple(name for name in _ON_DEMAND if name in vars(owner))
                for owner in _owners(batch)
            )
        )

    def make(self, batch: PackedBatch) -> None:
        """Read the same of another batch."""
        for owner, names in zip(_owners(batch), self.names, strict=True):
            for name in names:
                getattr(owner, name)


def _owners(batch: PackedBatch) -> Iterator[PackedBatch | Layout]:
    yield batch
    yield batch.layout
    yield batch.read_layout
    for insertion in batch.insertions:
        yield insertion.layout
        for generation in insertion.generations:
            yield generation.layout


def _room(values: Tensor) -> int:
    return -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
