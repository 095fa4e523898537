"""States of the trunk, the layers below all trained parameters: computed once, not once an epoch.

No parameter reaches the trunk, so its states are the same in every epoch. They are kept in memory
(the device's, where they fit), or in a memory-mapped file that is deleted with the cache.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from adapters.backbone.model import Backbone, Trunk
from adapters.packed.layout import Indices, Put
from adapters.packed.packing import PackedBatch, PromptSource, Row, RowShape
from adapters.tokenizer import Encoding

# `auto` keeps larger caches on disk.
MEMORY_BYTES = 4 * 2**30
# A cache that would take more than this share of a GPU's free memory stays in the host's.
DEVICE_SHARE = 0.4
# Tokens in one forward pass while the cache is filled.
FILL_TOKENS = {"cpu": 8192, "cuda": 32768}

Place = Literal["auto", "memory", "disk", "off"]


class TrunkCache:
    """The examples of a data set, with the states of all their tokens after the trunk.

    Args:
        encodings: all examples; methods take their indices.
        shape: how the method in training packs a row.
        trunk_layers: number of layers in the trunk; 0 keeps nothing.
        place: `auto` is memory up to `MEMORY_BYTES`, then disk.
        folder: for a cache on disk; the system's temporary folder by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        encodings: Sequence[Encoding],
        shape: RowShape,
        *,
        trunk_layers: int,
        place: Place = "auto",
        folder: Path | None = None,
    ) -> None:
        self._backbone = backbone
        self._encodings = encodings
        self._shape = shape
        self._trunk_layers = trunk_layers
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        self._starts = np.cumsum(lengths) - lengths
        self._lengths = lengths
        tokens = int(lengths.sum())
        states = 2 if self._keeps_embeddings else 1
        self.nbytes = tokens * backbone.hidden_size * states * backbone.dtype.itemsize
        self.place = _resolve_place(place, self.nbytes) if trunk_layers else "off"
        # Why nothing is kept although the caller asked for it.
        self.failure: str | None = None
        self._file: tempfile._TemporaryFileWrapper[bytes] | None = None
        self._states: Tensor | None = None
        if self.place != "off":
            self._allocate((states, tokens, backbone.hidden_size), folder)

    def __len__(self) -> int:
        return len(self._encodings)

    @property
    def encodings(self) -> Sequence[Encoding]:
        """Of all examples."""
        return self._encodings

    def fill(self) -> Iterator[int]:
        """Compute the states; yields the number of examples in each batch that is done."""
        if self._states is None:
            return
        for indices in self.chunks(FILL_TOKENS.get(self._backbone.device.type, 8192)):
            batch = self.pack(indices)
            trunk = self._compute(batch)
            spans = self._spans(indices, batch).to(self._states.device, non_blocking=True)
            self._states[0, spans] = trunk.hidden.to(self._states.device)
            if self._keeps_embeddings:
                assert trunk.embeddings is not None
                self._states[1, spans] = trunk.embeddings.to(self._states.device)
            yield len(indices)

    def chunks(self, tokens: int) -> Iterator[list[int]]:
        """All examples, sorted by length, in chunks of at most `tokens` tokens (or one example)."""
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

    @property
    def lengths(self) -> Indices:
        """Tokens of every example."""
        return self._lengths

    def pack(
        self,
        indices: Sequence[int],
        *,
        fillers: Sequence[int] = (),
        put: Put | None = None,
        room: int = 0,
    ) -> PackedBatch:
        """These examples as one batch of the method in training.

        Args:
            fillers: lengths of rows after the examples that only fill the batch up. Their tokens
                are any that the backbone can read.
            put, room: as in `PackedBatch`.
        """
        rows = [Row(self._encodings[index], self._shape, 0) for index in indices]
        first = self._encodings[indices[0]]
        rows += [Row(_repeated(first, length), self._shape, 0) for length in fillers]
        return self._backbone.pack(rows, put=put, room=room)

    def trunk(self, indices: Sequence[int], batch: PackedBatch) -> Trunk:
        """The states of `indices`, packed as `batch`, after the trunk: looked up, or computed if
        nothing is kept."""
        return self.look_up(batch, self.find(indices, batch))

    def find(
        self, indices: Sequence[int], batch: PackedBatch, *, put: Put | None = None
    ) -> tuple[Tensor, ...]:
        """What `look_up` needs for `indices`, packed as `batch`: everything that the host does.

        Args:
            put: as in `PackedBatch`.
        """
        if self._states is None:
            return ()
        place = put or partial(torch.Tensor.to, device=self._backbone.device, non_blocking=True)
        spans = self._spans(indices, batch)
        if self._states.device == self._backbone.device:
            return (place(spans),)
        return tuple(place(part.index_select(0, spans)) for part in self._states)

    def look_up(self, batch: PackedBatch, found: tuple[Tensor, ...]) -> Trunk:
        """The states that were found for this batch; only the device works."""
        if self._states is None:
            return self._compute(batch)
        if self._states.device == self._backbone.device:
            (spans,) = found
            found = tuple(part.index_select(0, spans) for part in self._states)
        hidden, *embeddings = found
        return Trunk(self._trunk_layers, hidden, embeddings[0] if embeddings else None)

    def close(self) -> None:
        """Free the memory or delete the file."""
        self._states = None
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _keeps_embeddings(self) -> bool:
        return self._shape.source is PromptSource.EMBEDDINGS

    @torch.no_grad()
    def _compute(self, batch: PackedBatch) -> Trunk:
        return self._backbone.trunk(batch, self._trunk_layers)

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
        """The device whose memory is used: the backbone's, if enough is free."""
        device = self._backbone.device
        if (
            device.type == "cuda"
            and self.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        ):
            return torch.device("cpu")
        return device

    def _mapped(self, shape: tuple[int, int, int], folder: Path | None) -> Tensor:
        # `close` deletes it.
        self._file = tempfile.NamedTemporaryFile(prefix="idspam-cache-", dir=folder)  # noqa: SIM115
        # Reserve the blocks now: a full disk is an error here, instead of a bus error in an epoch.
        os.posix_fallocate(self._file.fileno(), 0, max(self.nbytes, 1))
        flat = torch.from_file(
            self._file.name, shared=True, size=int(np.prod(shape)), dtype=self._backbone.dtype
        )
        return flat.view(shape)

    def _spans(self, indices: Sequence[int], batch: PackedBatch) -> Tensor:
        """Positions of the batch's tokens among the kept states: int64 [T].

        Rows after the examples get states from the start on, whosever they are.
        """
        starts = np.zeros(len(batch.rows), dtype=np.int64)
        starts[: len(indices)] = self._starts[indices]
        lengths = batch.layout.lengths
        spans = np.arange(batch.layout.tokens) + np.repeat(
            starts[batch.order] - batch.layout.starts, lengths
        )
        if len(indices) < len(batch.rows):
            # A filler may be longer than all texts together.
            np.minimum(spans, int(self._lengths.sum()) - 1, out=spans)
        return torch.from_numpy(spans)


def _repeated(encoding: Encoding, length: int) -> Encoding:
    """A row of this length that repeats the first token."""
    return Encoding(
        np.repeat(encoding.input_ids[:1], length),
        np.repeat(encoding.token_type_ids[:1], length),
        truncated=False,
    )


def _resolve_place(place: Place, nbytes: int) -> Literal["memory", "disk", "off"]:
    if place == "auto":
        return "memory" if nbytes <= MEMORY_BYTES else "disk"
    return place
