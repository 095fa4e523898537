"""What the adapters of a batch change inside the layers, over slots.

    vectors: y (1 + s) + b, elementwise, or inside the kernels of `adapters.layers.fused`
    LoRA:    two grouped products over tiles, x A and then + (x A) B, for any mixture of slots

No loop over adapters: a tile finds its slot's weights by the slot table. Slots without a tuning,
and layers outside of a slot's range, are left as they are. A batch without vectors or LoRA launches
nothing for them (`adapters.slots.batch.Signature`).
"""

from dataclasses import dataclass, replace

import torch
import triton
from msgspec import structs
from torch import Tensor

from adapters.layers.fused import RowVectors
from adapters.layers.tuning import LayerTuning
from adapters.packed.layout import Extents
from adapters.slots import triton_tuning
from adapters.slots.bank import Column
from adapters.slots.batch import TILE, LoraSites, Signature
from adapters.slots.extents import Places, SlottedExtents
from adapters.slots.kernels import alignment

_PROJECTED = 3
# Of an elementwise program: 16 numbers for each of its threads. With more, the error function of
# GELU takes so many registers that few programs run at a time.
_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 256
_MANY_POSITIONS = 2048
# A device runs some hundreds of programs at a time. Among more, those of tiles without LoRA cost
# their launches.
_PROGRAMS = 2048


@dataclass(frozen=True, slots=True)
class Sizes:
    """n and f of the backbone."""

    hidden: int
    intermediate: int


class SlotTuning:
    """`adapters.layers.tuning.BackboneTuning` over slots.

    Args:
        table: int64 [slots, Column].
        reads: of the positions that are read in the last layer.
    """

    def __init__(self, table: Tensor, signature: Signature, sizes: Sizes, reads: Places) -> None:
        self._table, self._signature, self._sizes, self._reads = table, signature, sizes, reads

    def at(self, layer: int, layout: Extents) -> LayerTuning | None:
        assert isinstance(layout, SlottedExtents), layout
        assert layout.places is not None
        return SlotLayerTuning(
            self._table, self._signature, self._sizes, layer, layout.places, self._reads
        )


@dataclass(frozen=True, slots=True)
class SlotLayerTuning:
    """`LayerTuning` of one layer; `adapters.layers.fused.FusedTuning` as well."""

    table: Tensor
    signature: Signature
    sizes: Sizes
    layer: int
    places: Places
    reads: Places

    @property
    def vectors(self) -> RowVectors | None:
        """What fused kernels apply themselves."""
        if not self.signature.vectors:
            return None
        assert self.places.owners is not None
        return RowVectors(
            table=self.table,
            layer=self.layer,
            rows=self.places.rows,
            owners=self.places.owners,
            scale=Column.SCALE,
            bias=Column.BIAS,
            first=Column.FIRST,
            end=Column.END,
            intermediate_size=self.sizes.intermediate,
        )

    def without_vectors(self) -> "SlotLayerTuning":
        """The other changes."""
        return replace(self, signature=structs.replace(self.signature, vectors=False))

    @property
    def between(self) -> bool:
        """Whether it changes or reads anything from `up` to `down`, but for the bias of `down`."""
        return self.signature.vectors or bool(self.signature.lora & (LoraSites.UP | LoraSites.DOWN))

    def projection(self, inputs: Tensor, output: Tensor) -> Tensor:
        self._low_rank(inputs, output, LoraSites.PROJECTION, Column.QUERY_A, Column.QUERY_B)
        self._modulate(output, offset=0)
        return output

    def dense(self, inputs: Tensor, output: Tensor) -> Tensor:
        self._low_rank(inputs, output, LoraSites.DENSE, Column.DENSE_A, Column.DENSE_B)
        return output

    def up(self, inputs: Tensor, output: Tensor) -> Tensor:
        self._low_rank(inputs, output, LoraSites.UP, Column.UP_A, Column.UP_B)
        self._modulate(output, offset=_PROJECTED * self.sizes.hidden)
        return output

    def activated(self, output: Tensor) -> Tensor:
        self._modulate(output, offset=0, scaled=False, shifted=False, after=True)
        return output

    def down(self, inputs: Tensor, output: Tensor) -> Tensor:
        self._low_rank(inputs, output, LoraSites.DOWN, Column.DOWN_A, Column.DOWN_B)
        sizes = self.sizes
        self._modulate(output, offset=_PROJECTED * sizes.hidden + sizes.intermediate, scaled=False)
        return output

    def up_to_activated(self, output: Tensor, *, near: bool = False) -> Tensor:
        """`up` without LoRA, GELU and `activated` in one pass: [T, f] -> [T, f]."""
        offset = _PROJECTED * self.sizes.hidden
        self._modulate(output, offset=offset, gelu=True, near=near, after=True)
        return output

    def select(self, _: Tensor) -> "SlotLayerTuning":
        return replace(self, places=self.reads)

    def _modulate(
        self,
        output: Tensor,
        *,
        offset: int,
        scaled: bool = True,
        shifted: bool = True,
        gelu: bool = False,
        near: bool = False,
        after: bool = False,
    ) -> None:
        if not self.signature.vectors:
            return
        assert output.stride(1) == 1, output.stride()
        owners, positions = self.places.owners, len(output)
        assert owners is not None
        n, f, width = self.sizes.hidden, self.sizes.intermediate, output.shape[1]
        columns = min(_BLOCK_COLUMNS, triton.next_power_of_2(width))
        # Among few positions, as those that are read, nearly each has another slot.
        rows = _BLOCK_ROWS if positions >= _MANY_POSITIONS else 2
        triton_tuning.modulate[(triton.cdiv(positions, rows), triton.cdiv(width, columns))](
            output,
            output.stride(0),
            owners,
            positions,
            self.table,
            self.table.stride(0),
            self.layer,
            OFFSET=offset,
            WIDTH=width,
            SCALES=3 * n + f,
            BIASES=4 * n + f,
            WIDE=f,
            SCALE=int(Column.SCALE),
            BIAS=int(Column.BIAS),
            ACTIVATED=int(Column.ACTIVATED),
            FIRST=int(Column.FIRST),
            END=int(Column.END),
            SCALED=scaled,
            SHIFTED=shifted,
            GELU=gelu,
            NEAR=near,
            AFTER=after,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=8 if rows == _BLOCK_ROWS else 1,
        )

    def _low_rank(
        self, inputs: Tensor, output: Tensor, site: LoraSites, a: Column, b: Column
    ) -> None:
        if site not in self.signature.lora:
            return
        assert inputs.stride(1) == output.stride(1) == 1, (inputs.stride(), output.stride())
        sites = _PROJECTED if site is LoraSites.PROJECTION else 1
        tiles, rank, dtype = self.places.tiles, self.signature.rank, output.dtype
        wide, outputs = inputs.shape[1], output.shape[1] // sites
        number = len(tiles) // 3
        narrow = torch.empty(len(inputs), sites * rank, dtype=dtype, device=inputs.device)
        columns = {
            "FIRST": int(Column.FIRST),
            "END": int(Column.END),
            "WIDTH": int(Column.RANK),
            "SITES": sites,
            "RANK": rank,
            "TILE_ROWS": TILE,
        }
        triton_tuning.shrink[(number, sites)](
            inputs,
            inputs.stride(0),
            tiles,
            self.table,
            self.table.stride(0),
            self.layer,
            narrow,
            INPUTS=wide,
            A=int(a),
            ALIGNED=alignment(wide, dtype),
            DEPTH=min(128, max(16, triton.next_power_of_2(wide))),
            **columns,
        )
        block = min(64, max(16, triton.next_power_of_2(outputs)))
        parts = max(1, min(triton.cdiv(outputs, block), _PROGRAMS // (number * sites)))
        triton_tuning.widen[(number, parts, sites)](
            narrow,
            tiles,
            self.table,
            self.table.stride(0),
            self.layer,
            output,
            output.stride(0),
            OUTPUTS=outputs,
            B=int(b),
            ALIGNED=alignment(outputs, dtype),
            COLUMNS=block,
            **columns,
        )
