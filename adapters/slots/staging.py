"""Pinned host memory that a device copies from, made once and lent in pieces.

Pinning takes a millisecond for each megabyte, during which every other thread waits for the driver.
So one block is pinned at the start, and whoever reads an adapter borrows a piece of it. A piece is
given back by itself, when nothing refers to its tensors any more. Where no piece is free, plain
memory does: it is copied once more.
"""

from collections import deque
from threading import Lock
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Pieces start and end at multiples of this many bytes.
_ALIGNMENT = 4096


class Staging:
    """One block of host memory. Safe to use from many threads.

    Args:
        nbytes: of the block.
        pinned: whether a device copies from it.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._bytes: NDArray[np.uint8] = self._block.numpy()
        self._begin = self._block.data_ptr()
        self._lock = Lock()
        # Start and end of what is free, in order; neighbours are joined.
        self._free = [(0, nbytes)] if nbytes else []
        # Pieces that were given back since. A piece can go in any thread at any time, also in one
        # that holds the lock.
        self._returned: deque[tuple[int, int]] = deque()
        # By start; they are called when their piece goes.
        self._lent: dict[int, ReferenceType[NDArray[np.uint8]]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether it lies in this block."""
        return 0 <= tensor.data_ptr() - self._begin < len(self._block)

    @property
    def nbytes_free(self) -> int:
        with self._lock:
            self._collect()
            return sum(end - start for start, end in self._free)

    def take(self, nbytes: int) -> Tensor | None:
        """Borrow a piece, uint8 [nbytes]; None if no piece is as large."""
        size = max(1, nbytes) + -max(1, nbytes) % _ALIGNMENT
        with self._lock:
            self._collect()
            for index, (start, end) in enumerate(self._free):
                if end - start >= size:
                    self._free[index : index + 1] = (
                        [(start + size, end)] if end - start > size else []
                    )
                    break
            else:
                return None
        # A tensor keeps the array that it was made from, and so do all views of that tensor.
        piece = self._bytes[start : start + nbytes]
        span = (start, start + size)
        self._lent[start] = ref(piece, lambda _: self._returned.append(span))
        return torch.from_numpy(piece)

    def _collect(self) -> None:
        while self._returned:
            start, end = self._returned.popleft()
            del self._lent[start]
            before = [span for span in self._free if span[1] <= start]
            after = self._free[len(before) :]
            if before and before[-1][1] == start:
                start = before.pop()[0]
            if after and after[0][0] == end:
                end = after.pop(0)[1]
            self._free = [*before, (start, end), *after]
