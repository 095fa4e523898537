"""Where the rows of a batch over slots are in a sequence of positions, and whose they are."""

from dataclasses import dataclass

from torch import Tensor

from adapters.packed.layout import Indices


@dataclass(frozen=True, slots=True)
class Places:
    """Whose positions are where. Rows of one slot are neighbours.

    tiles: int32 [3 * tiles]: slot, first position, end. owners: int32 [T], the slot of every
    position, -1 for the padding; None if no kernel needs it. rows: int32 [rows], the slot of every
    row. A row here is an entry of the sequence: of several rows with one text, one's slot.
    """

    tiles: Tensor
    owners: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class SlottedExtents:
    """`adapters.packed.layout.Extents` of rows that may be followed by padding.

    lengths: int64 [rows] on the host, for devices without an attention kernel for packed rows. None
    in a graph, where only sizes are known. places: None if no adapter changes the layers.
    """

    cumulative: Tensor
    longest: int
    lengths: Indices | None = None
    places: Places | None = None

    def by_run(self, states: Tensor) -> list[Tensor]:
        """[T, ...] -> [1, length, ...] for every row, and for the padding."""
        assert self.lengths is not None, (
            "graphs are captured only with an attention kernel for rows"
        )
        sizes = self.lengths.tolist()
        sizes += [len(states) - sum(sizes)]
        return [piece.unsqueeze(0) for piece in states.split([size for size in sizes if size])]
