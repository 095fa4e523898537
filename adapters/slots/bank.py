"""Active adapters on a device: each is in a slot, and kernels find it by the slot's number.

    Adapter --image_of--> AdapterImage (host memory, as the device wants it) --write--> slot

All that can be computed ahead is in the image, which is one block of bytes: filling a slot takes
one copy. A slot takes the memory of its adapter and no more, so an adapter of a few vectors does
not take the place of a prompt's generator. The copies come from pinned memory
(`adapters.slots.staging`): an image that was read into it is copied from there, any other one is
first copied into it.

A thread that calls into torch gives up the interpreter, and under load it waits for milliseconds
until it has it again. So many images are written with as few calls as one, and a slot whose next
adapter is as large as its last one keeps its memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np
import torch
from torch import Tensor

from adapters.backbone.model import Backbone, check_fits
from adapters.errors import InvalidAdapter
from adapters.flattened import Layout
from adapters.format.files import Adapter, all_finite
from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    FinalActivation,
    FirstTokenPrompt,
    HiddenActivation,
    LoraTuning,
    RoutedPrompt,
    StaticPrompt,
    VectorTuning,
)
from adapters.packed.prompt import GeneratorWeights
from adapters.slots.batch import Fact, facts_of
from adapters.slots.staging import Staging

# Every matrix starts at a multiple of this many bytes.
_ALIGNMENT = 16
# Pinned at the start, for what is on its way to the device.
STAGED_BYTES = 96 * 2**20


class Column(IntEnum):
    """The columns of the slot table, int64 [slots, Column].

    First addresses, 0 if there is no such matrix. DOWN to OUT are float32, each followed by its
    bias in memory, and their widths follow; W_up alone may be a bias without a matrix. QUERY:
    [n, n] in the backbone's type; without it every token gets the same weight, which is pooling by
    the mean. TABLE: [positions, width] in the backbone's type. SCALE, BIAS, ACTIVATED: float32
    [L, ...], as in `VectorTuning.shapes`. QUERY_A to DOWN_A: [L, r, inputs], and QUERY_B to DOWN_B:
    [L, r, outputs] times the scaling, in the backbone's type.

    INNER, FINAL, HIDDEN: the activations of the bottleneck, the prompt and the head. FIRST_TOKEN: 1
    if only the first token counts. ROUTED: 1 if the bottleneck is a router's answer. TEMPERATURE:
    the bits of a float32. FIRST, END: the tuned layers. RANK: r.
    """

    DOWN = 0
    UP = 1
    DENSE = 2
    OUT = 3
    DOWN_WIDTH = 4
    UP_WIDTH = 5
    DENSE_WIDTH = 6
    OUT_WIDTH = 7
    QUERY = 8
    TABLE = 9
    SCALE = 10
    BIAS = 11
    ACTIVATED = 12
    QUERY_A = 13
    KEY_A = 14
    VALUE_A = 15
    DENSE_A = 16
    UP_A = 17
    DOWN_A = 18
    QUERY_B = 19
    KEY_B = 20
    VALUE_B = 21
    DENSE_B = 22
    UP_B = 23
    DOWN_B = 24
    INNER = 25
    FINAL = 26
    HIDDEN = 27
    FIRST_TOKEN = 28
    ROUTED = 29
    SIGMOID = 30
    TEMPERATURE = 31
    POSITIONS = 32
    FIRST = 33
    END = 34
    RANK = 35


class Activation(IntEnum):
    """The codes of activations in the table."""

    NONE = 0
    RELU = 1
    TANH = 2
    GELU = 3


_FINAL = {
    FinalActivation.NONE: Activation.NONE,
    FinalActivation.RELU: Activation.RELU,
    FinalActivation.TANH: Activation.TANH,
}
_HIDDEN = {
    HiddenActivation.RELU: Activation.RELU,
    HiddenActivation.TANH: Activation.TANH,
    HiddenActivation.GELU: Activation.GELU,
}


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter in host memory, ready to be copied.

    memory: uint8, all its matrices. starts: where the matrix of a column is in it. values: the
    table's other columns that are not 0.
    """

    spec: AdapterSpec
    memory: Tensor
    starts: Mapping[Column, int]
    values: Mapping[Column, int]

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @property
    def layout(self) -> Layout:
        """All but spec and memory, as JSON values."""
        return {
            "starts": {column.name: start for column, start in self.starts.items()},
            "values": {column.name: value for column, value in self.values.items()},
        }

    @classmethod
    def restore(cls, spec: AdapterSpec, layout: Layout, memory: Tensor) -> Self:
        """The image that had this layout and this memory.

        Raises:
            KeyError, TypeError, ValueError: this is no layout of this memory.
        """
        starts = {Column[name]: int(start) for name, start in layout["starts"].items()}
        values = {Column[name]: int(value) for name, value in layout["values"].items()}
        if not all(0 <= start < len(memory) for start in starts.values()):
            raise ValueError("a matrix starts outside of the image's memory")
        return cls(spec, memory, starts, values)


@dataclass(frozen=True, slots=True)
class ActiveAdapter:
    """An adapter in a slot. nbytes: device memory that it takes there."""

    spec: AdapterSpec
    slot: int
    nbytes: int


def image_of(adapter: Adapter, backbone: Backbone) -> AdapterImage:
    """Fold and cast an adapter on the backbone's device and copy it to host memory.

    Raises:
        IncompatibleAdapter: it was made for another backbone.
        InvalidAdapter: its weights are finite, but their products or casts are not.
    """
    check_fits(adapter.spec, backbone)
    tensors = {
        name: tensor.to(backbone.device, torch.float32) for name, tensor in adapter.tensors.items()
    }
    builder = _Builder(backbone.dtype)
    _add_prompt(builder, adapter.spec, tensors)
    _add_tuning(builder, adapter.spec, tensors)
    _add_head(builder, adapter.spec, tensors)
    return builder.image(adapter.spec)


class _Builder:
    """Collects the matrices and the values of an image. dtype: of the backbone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._pieces: list[Tensor] = []
        self._size = 0
        self._starts: dict[Column, int] = {}
        self.values: dict[Column, int] = {}

    def add(self, column: Column, *tensors: Tensor) -> None:
        """Tensors of one type, one after the other."""
        self._starts[column] = self._size
        flat = torch.cat([tensor.flatten() for tensor in tensors]).contiguous().view(torch.uint8)
        padding = -len(flat) % _ALIGNMENT
        self._pieces += [flat, flat.new_zeros(padding)]
        self._size += len(flat) + padding

    def add_linear(self, column: Column, matrix: Tensor | None, bias: Tensor) -> None:
        """A matrix and its bias, which alone stays float32."""
        self.add(column, *([] if matrix is None else [matrix]), bias)
        self.values[Column(column + Column.DOWN_WIDTH - Column.DOWN)] = len(bias)

    def add_cast(self, column: Column, name: str, tensor: Tensor) -> None:
        """A matrix that multiplies every token.

        Raises:
            InvalidAdapter: it is not finite in the backbone's type.
        """
        cast = tensor.to(self._dtype)
        if not all_finite(cast):
            raise InvalidAdapter([f"{name}: not finite once folded and cast to {self._dtype}"])
        self.add(column, cast)

    def image(self, spec: AdapterSpec) -> AdapterImage:
        return AdapterImage(spec, torch.cat(self._pieces).cpu(), self._starts, self.values)


def _add_prompt(builder: _Builder, spec: AdapterSpec, tensors: dict[str, Tensor]) -> None:
    match spec.prompt:
        case AttentionPrompt() as prompt:
            folded = GeneratorWeights.of(prompt, tensors).folded()
            assert folded.down is not None
            assert folded.down_bias is not None
            assert folded.up_bias is not None
            if not all_finite(folded.down):
                raise InvalidAdapter(["generator: not finite once folded"])
            if folded.query is not None:
                builder.add_cast(Column.QUERY, "generator", folded.query)
            builder.add_linear(Column.DOWN, folded.down, folded.down_bias)
            builder.add_linear(Column.UP, folded.up, folded.up_bias)
            builder.values[Column.INNER] = Activation.RELU
            builder.values[Column.FINAL] = _FINAL[prompt.final_activation]
        case FirstTokenPrompt():
            for column, name in ((Column.DOWN, "down"), (Column.UP, "up")):
                weight = tensors[f"generator.{name}.weight"]
                builder.add_linear(column, weight, tensors[f"generator.{name}.bias"])
            builder.values[Column.INNER] = Activation.RELU
            builder.values[Column.FIRST_TOKEN] = 1
        case RoutedPrompt():
            router, bank = tensors["generator.router"], tensors["generator.bank"]
            builder.add_linear(Column.DOWN, router, router.new_zeros(router.shape[1]))
            builder.add_linear(Column.UP, bank, bank.new_zeros(bank.shape[1]))
            builder.values[Column.ROUTED] = 1
        case StaticPrompt() as prompt:
            builder.add_linear(Column.UP, None, tensors["prompt.vectors"].flatten())
            if prompt.table is not None:
                # A text has no more tokens.
                rows = tensors["prompt.table.a"][: spec.max_length]
                builder.add_cast(Column.TABLE, "prompt.table", rows @ tensors["prompt.table.b"])
                builder.values[Column.POSITIONS] = len(rows)
        case None:
            pass


def _add_tuning(builder: _Builder, spec: AdapterSpec, tensors: dict[str, Tensor]) -> None:
    tuning = spec.tuning
    if tuning is None:
        return
    builder.values[Column.FIRST], builder.values[Column.END] = tuning.layers
    match tuning:
        case VectorTuning():
            builder.add(Column.SCALE, tensors["tuning.scale"])
            builder.add(Column.BIAS, tensors["tuning.bias"])
            if tuning.activated:
                builder.add(Column.ACTIVATED, tensors["tuning.activated"])
        case LoraTuning():
            builder.values[Column.RANK] = tuning.rank
            for site in tuning.sites:
                name = f"tuning.{site}"
                # Its rows are read along the inputs.
                a = tensors[f"{name}.a"].transpose(1, 2)
                builder.add_cast(Column[f"{site.name}_A"], f"{name}.a", a)
                b = tensors[f"{name}.b"] * tuning.scaling
                builder.add_cast(Column[f"{site.name}_B"], f"{name}.b", b)


def _add_head(builder: _Builder, spec: AdapterSpec, tensors: dict[str, Tensor]) -> None:
    if "head.dense.weight" in tensors:
        builder.add_linear(Column.DENSE, tensors["head.dense.weight"], tensors["head.dense.bias"])
        builder.values[Column.HIDDEN] = _HIDDEN[spec.head.hidden]
    builder.add_linear(Column.OUT, tensors["head.out.weight"], tensors["head.out.bias"])
    builder.values[Column.SIGMOID] = spec.activation == "sigmoid"
    temperature = np.float32(spec.calibration.temperature)
    builder.values[Column.TEMPERATURE] = int(temperature.view(np.int32))


class SlotBank:
    """The slots of one device.

    Attributes:
        table: int64 [slots, Column].
        facts: int64 [slots, Fact] in host memory, from which batches are built.
        staging: host memory from which an image is copied without another copy.

    Args:
        slots: adapters that can be active at once.
    """

    def __init__(self, slots: int, *, device: torch.device) -> None:
        self.table = torch.zeros(slots, len(Column), dtype=torch.int64, device=device)
        self.facts = np.zeros((slots, len(Fact)), dtype=np.int64)
        self.staging = Staging(STAGED_BYTES if self.table.is_cuda else 0, pinned=self.table.is_cuda)
        # Kernels know the adapters only by address: this list keeps them alive.
        self._memory: list[Tensor | None] = [None] * slots
        # The slots' rows of the table, as they are first needed: making a view takes a call.
        self._rows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._memory)

    @property
    def nbytes(self) -> int:
        """Device memory of the table and of the adapters in its slots."""
        adapters = sum(memory.nbytes for memory in self._memory if memory is not None)
        return self.table.nbytes + adapters

    def write(self, images: Sequence[tuple[int, AdapterImage]]) -> list[Tensor]:
        """Fill slots that no running batch uses from (slot, image) pairs, on the current stream.

        Asynchronous on CUDA: the images and the memory that this returns must be kept until the
        stream has got there. Several threads may write at the same time, each into its own slots.
        """
        sources = self._staged([image.memory for _, image in images])
        rows = self._host_memory(len(images) * len(Column) * 8).view(torch.int64)
        new_rows = rows.view(len(images), len(Column))
        targets = []
        for row, (slot, image) in zip(new_rows.numpy(), images, strict=True):
            memory = self._memory_of(slot, len(image.memory))
            targets.append(memory)
            self.facts[slot] = facts_of(image.spec)
            row[:] = 0
            address = memory.data_ptr()
            for column, start in image.starts.items():
                row[column] = address + start
            for column, value in image.values.items():
                row[column] = value
        targets += [self._row_of(slot) for slot, _ in images]
        # One call, however many images there are.
        torch._foreach_copy_(targets, [*sources, *new_rows], non_blocking=True)
        return [*sources, rows]

    def clear(self, slot: int) -> None:
        """Give back the memory of a slot that no running batch uses."""
        self._memory[slot] = None

    def _memory_of(self, slot: int, nbytes: int) -> Tensor:
        """The slot's memory on the device, which has this size from now on."""
        memory = self._memory[slot]
        if memory is None or len(memory) != nbytes:
            # Not both at once.
            self._memory[slot] = memory = None
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.table.device)
            self._memory[slot] = memory
        return memory

    def _row_of(self, slot: int) -> Tensor:
        row = self._rows.get(slot)
        if row is None:
            row = self._rows[slot] = self.table[slot]
        return row

    def _staged(self, memories: Sequence[Tensor]) -> list[Tensor]:
        """The same bytes where the device can copy from without waiting, as far as there is room.

        From anywhere else the driver copies through memory of its own, while this thread waits.
        """
        staged = list(memories)
        if not self.table.is_cuda:
            return staged
        pieces, plain = [], []
        for index, memory in enumerate(memories):
            if memory not in self.staging and (piece := self.staging.take(len(memory))) is not None:
                staged[index] = piece
                pieces.append(piece)
                plain.append(memory)
        if pieces:
            torch._foreach_copy_(pieces, plain)
        return staged

    def _host_memory(self, nbytes: int) -> Tensor:
        """Host memory, uint8, from which the device copies."""
        piece = self.staging.take(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8) if piece is None else piece
