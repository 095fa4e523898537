"""The frozen part below the insertion layer, computed once per example instead of once per epoch.

What enters layer m of a text depends on no adapter, so it is kept: in memory, or in a memory-mapped
file that is deleted with the cache. Knows no labels and no adapter.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from adapters.backbone import Backbone, Trunk
from adapters.packing import PackedBatch, Row
from adapters.spec import AdapterSpec, GeneratorInput
from adapters.tokenizer import Encoding

logger = logging.getLogger(__name__)

# How much of the cache may live in memory before `auto` moves it to disk.
MEMORY_BYTES = 4 * 2**30
# Tokens of one forward pass while the cache is filled.
FILL_TOKENS = 8192

Place = Literal["auto", "memory", "disk", "off"]


class TrunkCache:
    """States of every example's tokens at the insertion layer.

    Args:
        encodings: all examples; they are addressed by their index from then on.
        spec: of the adapter to train: its insertion layer, and whether its generator reads the
            embeddings.
        place: `auto` is memory up to `MEMORY_BYTES`, then disk.
        folder: where a disk cache goes; the system's temporary folder by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        encodings: Sequence[Encoding],
        spec: AdapterSpec,
        *,
        place: Place = "auto",
        folder: Path | None = None,
    ) -> None:
        self._backbone = backbone
        self._encodings = encodings
        self._spec = spec
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        self._starts = np.cumsum(lengths) - lengths
        self._lengths = lengths
        tokens = int(lengths.sum())
        states = 2 if self._keeps_embeddings else 1
        self.nbytes = tokens * backbone.hidden_size * states * backbone.dtype.itemsize
        self.place = _chosen(place, self.nbytes)
        self._file: tempfile._TemporaryFileWrapper[bytes] | None = None
        self._states: Tensor | None = None
        if self.place != "off" and spec.insertion_layer > 0:
            self._allocate((states, tokens, backbone.hidden_size), folder)

    def __len__(self) -> int:
        return len(self._encodings)

    def fill(self) -> Iterator[int]:
        """Compute the states; yields the number of examples done, for a progress bar."""
        if self._states is None:
            return
        for chosen in self.chunks(FILL_TOKENS):
            batch = self.pack(chosen)
            with torch.no_grad():
                trunk = self._backbone.trunk(batch, self._spec.insertion_layer)
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
        """These examples as one batch of the adapter in training."""
        return self._backbone.pack(
            [Row(self._encodings[index], self._spec, 0) for index in indices]
        )

    def trunk(self, indices: Sequence[int], batch: PackedBatch) -> Trunk | None:
        """The kept states of a batch that `pack` made of `indices`; None where nothing is kept."""
        if self._states is None:
            return None
        spans = self._spans(np.asarray(indices)[batch.order])
        states = [part.index_select(0, spans).to(self._backbone.device) for part in self._states]
        return Trunk(
            self._spec.insertion_layer, states[0], states[1] if self._keeps_embeddings else None
        )

    def close(self) -> None:
        """Free the memory or delete the file."""
        self._states = None
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _keeps_embeddings(self) -> bool:
        return self._spec.generator_input is GeneratorInput.EMBEDDINGS

    def _allocate(self, shape: tuple[int, int, int], folder: Path | None) -> None:
        if self.place == "disk":
            try:
                self._states = self._mapped(shape, folder)
                return
            except OSError as error:
                logger.warning(
                    "no room on disk for a cache of %d MB (%s): doing without it",
                    self.nbytes >> 20,
                    error,
                )
                self.place = "off"
                return
        self._states = torch.empty(shape, dtype=self._backbone.dtype)

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
        lengths = self._lengths[indices]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return torch.from_numpy(np.repeat(self._starts[indices], lengths) + within)


def _chosen(place: Place, nbytes: int) -> Literal["memory", "disk", "off"]:
    if place == "auto":
        return "memory" if nbytes <= MEMORY_BYTES else "disk"
    return place
