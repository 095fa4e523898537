"""The frozen part below what is trained, computed once per example instead of once per epoch.

What leaves the layers that no parameter reaches is the same in every epoch, so it is kept: in
memory (the device's, where it fits), or in a memory-mapped file that is deleted with the cache.
Knows no labels and no method.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from adapters.backbone.model import Backbone, Trunk
from adapters.format.spec import GeneratorInput
from adapters.packed.packing import PackedBatch, Row, RowShape
from adapters.tokenizer import Encoding

# How much of the cache may live in the host's memory before `auto` moves it to disk.
MEMORY_BYTES = 4 * 2**30
# Which share of a GPU's free memory it may take; beyond that it stays with the host.
DEVICE_SHARE = 0.4
# Tokens of one forward pass while the cache is filled.
FILL_TOKENS = {"cpu": 8192, "cuda": 32768}

Place = Literal["auto", "memory", "disk", "off"]


class TrunkCache:
    """States of every example's tokens behind the layers that are kept.

    Args:
        encodings: all examples; they are addressed by their index from then on.
        shape: how a row of the method in training stands in a batch.
        kept_layers: how many layers are kept; with none there is nothing to compute or keep.
        place: `auto` is memory up to `MEMORY_BYTES`, then disk.
        folder: where a disk cache goes; the system's temporary folder by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        encodings: Sequence[Encoding],
        shape: RowShape,
        *,
        kept_layers: int,
        place: Place = "auto",
        folder: Path | None = None,
    ) -> None:
        self._backbone = backbone
        self._encodings = encodings
        self._shape = shape
        self._kept_layers = kept_layers
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        self._starts = np.cumsum(lengths) - lengths
        self._lengths = lengths
        tokens = int(lengths.sum())
        states = 2 if self._keeps_embeddings else 1
        self.nbytes = tokens * backbone.hidden_size * states * backbone.dtype.itemsize
        self.place = _chosen(place, self.nbytes) if kept_layers else "off"
        # Why there is none, where one was wanted.
        self.failure: str | None = None
        self._file: tempfile._TemporaryFileWrapper[bytes] | None = None
        self._states: Tensor | None = None
        if self.place != "off":
            self._allocate((states, tokens, backbone.hidden_size), folder)

    def __len__(self) -> int:
        return len(self._encodings)

    def fill(self) -> Iterator[int]:
        """Compute the states; yields the number of examples done, for a progress bar."""
        if self._states is None:
            return
        for chosen in self.chunks(FILL_TOKENS.get(self._backbone.device.type, 8192)):
            batch = self.pack(chosen)
            trunk = self._computed(batch)
            spans = self._spans(np.asarray(chosen)[batch.order])
            self._states[0, spans] = trunk.hidden.to(self._states.device)
            if self._keeps_embeddings:
                assert trunk.embeddings is not None
                self._states[1, spans] = trunk.embeddings.to(self._states.device)
            yield len(chosen)

    def chunks(self, tokens: int) -> Iterator[list[int]]:
        """All examples by length, in pieces of at most `tokens` tokens (or of one example)."""
        chunk: list[int] = []
        total = 0
        for index in np.argsort(self._lengths, kind="stable"):
            length = int(self._lengths[index])
            if chunk and total + length > tokens:
                yield chunk
                chunk, total = [], 0
            chunk.append(int(index))
            total += length
        if chunk:
            yield chunk

    def pack(self, indices: Sequence[int]) -> PackedBatch:
        """These examples as one batch of the method in training."""
        return self._backbone.pack(
            [Row(self._encodings[index], self._shape, 0) for index in indices]
        )

    def trunk(self, indices: Sequence[int], batch: PackedBatch) -> Trunk:
        """A batch that `pack` made of `indices` behind the kept layers: looked up, or computed
        where nothing is kept."""
        if self._states is None:
            return self._computed(batch)
        spans = self._spans(np.asarray(indices)[batch.order])
        device = self._backbone.device
        hidden, *embeddings = (
            part.index_select(0, spans).to(device, non_blocking=True) for part in self._states
        )
        return Trunk(self._kept_layers, hidden, embeddings[0] if embeddings else None)

    def close(self) -> None:
        """Free the memory or delete the file."""
        self._states = None
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _keeps_embeddings(self) -> bool:
        return self._shape.generator_input is GeneratorInput.EMBEDDINGS

    @torch.no_grad()
    def _computed(self, batch: PackedBatch) -> Trunk:
        return self._backbone.trunk(batch, self._kept_layers)

    def _allocate(self, shape: tuple[int, int, int], folder: Path | None) -> None:
        if self.place == "disk":
            try:
                self._states = self._mapped(shape, folder)
                return
            except OSError as error:
                self.place, self.failure = "off", error.strerror or str(error)
                return
        self._states = torch.empty(shape, dtype=self._backbone.dtype, device=self._memory())

    def _memory(self) -> torch.device:
        """Whose memory: the device's where there is plenty."""
        device = self._backbone.device
        if (
            device.type == "cuda"
            and self.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        ):
            return torch.device("cpu")
        return device

    def _mapped(self, shape: tuple[int, int, int], folder: Path | None) -> Tensor:
        # Lives as long as the cache, which `close` ends.
        self._file = tempfile.NamedTemporaryFile(prefix="idspam-cache-", dir=folder)  # noqa: SIM115
        # Reserve the blocks now: a full disk must be noticed here, not as a bus error in the middle
        # of an epoch.
        os.posix_fallocate(self._file.fileno(), 0, max(self.nbytes, 1))
        flat = torch.from_file(
            self._file.name, shared=True, size=int(np.prod(shape)), dtype=self._backbone.dtype
        )
        return flat.view(shape)

    def _spans(self, indices: np.ndarray) -> Tensor:
        """Where these examples' tokens stand among the kept ones, beside them."""
        assert self._states is not None
        lengths = self._lengths[indices]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        spans = torch.from_numpy(np.repeat(self._starts[indices], lengths) + within)
        return spans.to(self._states.device, non_blocking=True)


def _chosen(place: Place, nbytes: int) -> Literal["memory", "disk", "off"]:
    if place == "auto":
        return "memory" if nbytes <= MEMORY_BYTES else "disk"
    return place
