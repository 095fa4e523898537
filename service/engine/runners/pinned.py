"""Page-locked host memory for the batches of one lane.

PyTorch's allocator of such memory records an event on the streams that used a piece when the piece
is freed. Answers are dropped by other threads at any time, also while the lane captures a CUDA
graph: then the event belongs to the capture, and the next thread that allocates asks for it, which
ends the capture and with it the engine. So a lane keeps its memory, and answers are copied out.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Memory of one batch, as PyTorch and NumPy see it. Views take longer than a batch can wait, so
    these are made once.

    integers: int32. floats: float32. array: int32. All are the same memory.
    """

    integers: Tensor
    floats: Tensor
    array: npt.NDArray[np.int32]


class PinnedMemory:
    """Pieces that are used again. Belongs to one thread.

    It holds as many pieces of each power of two as were in use at the same time.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Piece]] = defaultdict(list)

    def take(self, count: int) -> Piece:
        """Room for at least so many numbers."""
        size = 1 << max(0, count - 1).bit_length()
        if free := self._free[size]:
            return free.pop()
        integers = torch.empty(size, dtype=torch.int32, pin_memory=True)
        return Piece(integers, integers.view(torch.float32), integers.numpy())

    def give_back(self, piece: Piece) -> None:
        """A piece that nothing copies from or to any more."""
        self._free[len(piece.array)].append(piece)
