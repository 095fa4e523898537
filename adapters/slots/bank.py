"""Active adapters on a device: each is in a slot, and kernels find it by the slot's number.

    Adapter --image_of--> AdapterImage (host memory, as the device wants it) --write--> slot

All that can be computed ahead is in the image, so filling a slot takes two copies: the folded query
matrix, into a bank with a place for each slot, and the rest as one float32 array. The copies go
through a few pinned buffers. Images are not pinned: pinning takes a millisecond for each
megabyte, during which every other thread waits for the driver.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from adapters.adapter import prepare
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec, AttentionPrompt, FinalActivation
from adapters.slots.batch import Fact, facts_of

# Every matrix starts at a multiple of this many float32: 16 bytes.
_ALIGNMENT = 4


class Column(IntEnum):
    """The columns of the slot table, int64 [slots, Column].

    First the addresses of four matrices, each followed by its bias in memory. Then their widths, 0
    if there is no such matrix. final, sigmoid: the activations of prompt and scores. temperature:
    the bits of a float32.
    """

    DOWN = 0
    UP = 1
    DENSE = 2
    OUT = 3
    DOWN_WIDTH = 4
    UP_WIDTH = 5
    DENSE_WIDTH = 6
    OUT_WIDTH = 7
    FINAL = 8
    SIGMOID = 9
    TEMPERATURE = 10


_FINAL_CODES = {FinalActivation.NONE: 0, FinalActivation.RELU: 1, FinalActivation.TANH: 2}


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter in host memory, ready to be copied.

    query: [n, n] in the backbone's type; zeros give every token the same weight, which is pooling
    by the mean. rest: float32, the table's matrices with their biases. offsets: the start of each
    in `rest`. widths: of each, 0 if there is none.
    """

    spec: AdapterSpec
    query: Tensor
    rest: Tensor
    offsets: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.query.nbytes + self.rest.nbytes


@dataclass(frozen=True, slots=True)
class ActiveAdapter:
    """An adapter in a slot. nbytes: device memory that it takes there."""

    spec: AdapterSpec
    slot: int
    nbytes: int


def image_of(adapter: Adapter, backbone: Backbone) -> AdapterImage:
    """Fold and cast an adapter on the backbone's device and copy it to host memory.

    Raises:
        IncompatibleAdapter, InvalidAdapter: as `prepare`.
    """
    prepared = prepare(adapter, backbone)
    generator, head, n = prepared.generator, prepared.head, backbone.hidden_size
    query = generator.query
    if query is None:
        query = torch.zeros(n, n, dtype=backbone.dtype, device=backbone.device)
    # In the order of the table's columns.
    matrices: tuple[tuple[Tensor | None, Tensor | None], ...] = (
        (generator.down, generator.down_bias),
        (generator.up, generator.up_bias),
        (head.dense, head.dense_bias),
        (head.out, head.out_bias),
    )
    pieces: list[Tensor] = []
    offsets, widths, total = [], [], 0
    for matrix, bias in matrices:
        offsets.append(total)
        widths.append(0 if bias is None else len(bias))
        if matrix is None or bias is None:
            continue
        size = matrix.numel() + len(bias)
        padding = -size % _ALIGNMENT
        pieces += [matrix.flatten(), bias, bias.new_zeros(padding)]
        total += size + padding
    rest = torch.cat(pieces).cpu()
    return AdapterImage(adapter.spec, query.cpu(), rest, tuple(offsets), tuple(widths))


class SlotBank:
    """The slots of one device.

    Attributes:
        query: [slots, n, n]. table: int64 [slots, Column].
        facts: int64 [slots, Fact] in host memory, from which batches are built.

    Args:
        slots: adapters that can be active at once.
        hidden_size: n.
    """

    def __init__(
        self, slots: int, *, hidden_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        n = hidden_size
        self.query = torch.zeros(slots, n, n, device=device, dtype=dtype)
        self.table = torch.zeros(slots, len(Column), dtype=torch.int64, device=device)
        self.facts = np.zeros((slots, len(Fact)), dtype=np.int64)
        # Kernels know these tensors only by address: this list keeps them alive.
        self._rests: list[Tensor | None] = [None] * slots
        # Pinned memory for the largest number of images that one call has written.
        self._staging: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._rests)

    @property
    def nbytes(self) -> int:
        """Device memory of the bank and of the adapters in its slots."""
        rests = sum(rest.nbytes for rest in self._rests if rest is not None)
        return self.query.nbytes + rests

    def write(self, images: Sequence[tuple[int, AdapterImage]]) -> None:
        """Fill slots that no running batch uses from (slot, image) pairs, on the current stream.

        Asynchronous on CUDA: synchronise the stream before the next call.
        """
        device = self.query.device
        rows = np.zeros((len(images), len(Column)), dtype=np.int64)
        for index, (row, (slot, image)) in enumerate(zip(rows, images, strict=True)):
            query, rest = self._staged(index, image)
            self.query[slot].copy_(query, non_blocking=True)
            rest = rest.to(device, non_blocking=True)
            self._rests[slot] = rest
            self.facts[slot] = facts_of(image.spec)
            row[Column.DOWN : Column.OUT + 1] = image.offsets
            row[Column.DOWN : Column.OUT + 1] *= rest.element_size()
            row[Column.DOWN : Column.OUT + 1] += rest.data_ptr()
            row[Column.DOWN_WIDTH : Column.OUT_WIDTH + 1] = image.widths
            row[Column.FINAL] = _FINAL_CODES[_final_activation(image.spec)]
            row[Column.SIGMOID] = image.spec.activation == "sigmoid"
            temperature = np.float32(image.spec.calibration.temperature)
            row[Column.TEMPERATURE] = temperature.view(np.int32)
        slots = torch.tensor([slot for slot, _ in images], device=device)
        self.table.index_copy_(0, slots, torch.from_numpy(rows).to(device))

    def _staged(self, index: int, image: AdapterImage) -> tuple[Tensor, Tensor]:
        """The query and the rest of an image, on CUDA in the pinned buffers number `index`."""
        if not self.query.is_cuda:
            return image.query, image.rest
        if index == len(self._staging):
            self._staging.append((_pinned_like(image.query), _pinned_like(image.rest)))
        query, rest = self._staging[index]
        if len(rest) < len(image.rest):
            rest = _pinned_like(image.rest)
            self._staging[index] = query, rest
        return query.copy_(image.query), rest[: len(image.rest)].copy_(image.rest)


def _final_activation(spec: AdapterSpec) -> FinalActivation:
    prompt = spec.prompt
    return prompt.final_activation if isinstance(prompt, AttentionPrompt) else FinalActivation.NONE


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
