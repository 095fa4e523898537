"""What the adapters of a batch change inside the layers of the frozen backbone.

A layer calls its `LayerTuning` at every site (`adapters.format.spec.Site`) with what goes into the
linear map there and what came out, and goes on with what it gets back. The backbone's own weights
stay as they are, so one pass runs rows of any adapters, tuned or not.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor

from adapters.packed.layout import Extents


class LayerTuning(Protocol):
    """The changes to one layer for a sequence of T positions.

    Every method returns the new output and may change `output` in place, unless it needs a
    gradient. f is the width of the feed-forward part.
    """

    def projection(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Queries, keys and values, joined: [T, n], [T, 3 n] -> [T, 3 n]"""
        ...

    def dense(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The output of attention: [T, n], [T, n] -> [T, n]"""
        ...

    def up(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The feed-forward part before its activation: [T, n], [T, f] -> [T, f]"""
        ...

    def activated(self, output: Tensor) -> Tensor:
        """The feed-forward part after its activation: [T, f] -> [T, f]"""
        ...

    def down(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The output of the feed-forward part: [T, f], [T, n] -> [T, n]"""
        ...

    def select(self, positions: Tensor) -> "LayerTuning":
        """The same changes for some of the positions, int64 [R]."""
        ...


@runtime_checkable
class SplitTuning(LayerTuning, Protocol):
    """A `LayerTuning` for layers that make queries for fewer positions than keys and values."""

    def queries(self, inputs: Tensor, output: Tensor) -> Tensor:
        """[T, n], [T, n] -> [T, n]"""
        ...

    def keys_and_values(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Joined: [T, n], [T, 2 n] -> [T, 2 n]"""
        ...


class BackboneTuning(Protocol):
    """The changes to all layers in one pass."""

    def at(self, layer: int, layout: Extents) -> LayerTuning | None:
        """The changes to a layer whose input has this layout; None: there are none."""
        ...
