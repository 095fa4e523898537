"""Page-locked host memory for the batches of one lane.

PyTorch's allocator of such memory records an event on the streams that used a piece when the piece
is freed. Answers are dropped by other threads at any time, also while the lane captures a CUDA
graph: then the event belongs to the capture, and the next thread that allocates asks for it, which
ends the capture and with it the engine. So a lane keeps its memory, and answers are copied out.
"""

from collections import defaultdict

import torch
from torch import Tensor


class PinnedMemory:
    """Pieces that are used again. Belongs to one thread.

    It holds as many pieces of each power of two as were in use at the same time.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, nbytes: int) -> Tensor:
        """uint8, at least `nbytes` long."""
        size = 1 << max(0, nbytes - 1).bit_length()
        if free := self._free[size]:
            return free.pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def give_back(self, piece: Tensor) -> None:
        """A piece that nothing copies from or to any more."""
        self._free[len(piece)].append(piece)
