"""The batch shapes that are captured as CUDA graphs: buckets.

A graph runs at the size it was captured with, so a batch is padded to the cheapest bucket that
holds it. Buckets are close together where a token costs time, and far apart where the launches
cost more than the tokens.
"""

from bisect import bisect_left
from collections.abc import Container, Iterator

from adapters.slots.batch import TILE, BatchShape, Signature

# Below this many positions a forward pass takes the time of its launches, whatever it computes.
_LAUNCH_BOUND = 1024
_SMALL = (64, 128, 256, 512, _LAUNCH_BOUND)
_STEPS = (1.0, 1.25, 1.5, 1.75)
# The share of text among a large bucket's positions; prompts are the rest.
_TEXT_SHARES = (0.75, 0.82, 0.9, 1.0)
# The same where rows have one text: the lower layers run it once.
_SHARED_SHARES = (0.125, 0.25, 0.5)
# The share of the prompts that are there before the last insertion, in batches with several. Rows
# without an early prompt would otherwise cost its positions in all layers up to there.
_EARLY_SHARES = (0.5, 1.0)
# Rows of this mean length fill a bucket; an unused row costs a few empty thread blocks a layer.
_SHORTEST_MEAN = 24
# Positions of the longest row in buckets for short rows, whose attention launches fewer blocks.
_SHORT = 256
# Up to so many positions there are no buckets for texts that rows share: they would not be quicker.
MOST_UNSHARED = 256


class Buckets:
    """The buckets of one signature.

    Args:
        max_positions: positions of a batch, prompts included.
        longest: positions of the longest row that any adapter takes, its prompt included.

    Attributes:
        shapes: for texts that are all different; cheapest first.
    """

    def __init__(self, signature: Signature, *, max_positions: int, longest: int) -> None:
        every: dict[BatchShape, bool] = {}
        for positions in _sizes(max_positions):
            usual = _TEXT_SHARES if positions > _LAUNCH_BOUND else (1.0,)
            for share in (*usual, *(_SHARED_SHARES if positions > MOST_UNSHARED else ())):
                several = len(signature.insertions) > 1 and share < 1
                for early in _EARLY_SHARES if several else (1.0,):
                    for row in sorted({min(positions, _SHORT, longest), min(positions, longest)}):
                        shape = _shape(
                            signature,
                            positions=positions,
                            tokens=int(share * positions),
                            early=early,
                            longest=row,
                            usual=share in usual,
                        )
                        every[shape] = share in usual
        self.shapes = sorted([shape for shape, usual in every.items() if usual], key=cost)
        self._costs = [cost(shape) for shape in self.shapes]
        self._all = sorted(every, key=cost)
        self._all_costs = [cost(shape) for shape in self._all]

    def cheapest(
        self,
        needed: BatchShape,
        *,
        shared: bool = False,
        among: Container[BatchShape] | None = None,
    ) -> BatchShape | None:
        """The cheapest bucket that holds a batch of this shape.

        Args:
            shared: rows share texts, so there may be more positions than tokens.
            among: None: all.
        """
        shapes, costs = (self._all, self._all_costs) if shared else (self.shapes, self._costs)
        # Nothing cheaper than the batch itself can hold it.
        for shape in shapes[bisect_left(costs, cost(needed)) :]:
            if shape.holds(needed) and (among is None or shape in among):
                return shape
        return None


def cost(shape: BatchShape) -> int:
    """Grows with the time that a batch of this shape takes."""
    return shape.tokens + sum(shape.expanded) + shape.longest // 8


def _sizes(most: int) -> Iterator[int]:
    yield from (size for size in _SMALL if size < most)
    octave = _LAUNCH_BOUND
    while octave < most:
        for step in _STEPS:
            if _LAUNCH_BOUND < (size := int(octave * step)) < most:
                yield size
        octave *= 2
    yield most


def _shape(
    signature: Signature, *, positions: int, tokens: int, early: float, longest: int, usual: bool
) -> BatchShape:
    points = len(signature.insertions)
    before = tokens + int(early * (positions - tokens))
    rows = max(4, positions // _SHORTEST_MEAN)
    return BatchShape(
        rows=rows,
        # Fewer where rows share them; an unused one costs as an unused row.
        texts=rows if usual else max(4, tokens // _SHORTEST_MEAN),
        tokens=tokens,
        expanded=(before,) * (points - 1) + (positions,) * min(points, 1),
        reads=positions if signature.mean else rows,
        longest=longest,
        tiles=positions // TILE + rows,
    )
