"""Which sizes of batches are captured as CUDA graphs. Knows no device.

A graph runs at the size that it was captured with, so a batch runs on the cheapest rung that holds
it. Rungs are dense where a token costs time and sparse where launching is all that there is to pay.
"""

from bisect import bisect_left
from collections.abc import Iterator

from adapters.slots.batch import TILE, Caps, Signature

# Below so many positions a forward pass takes the time of its launches, whatever their number.
_LAUNCH_BOUND = 1024
_SMALL = (64, 128, 256, 512, _LAUNCH_BOUND)
_STEPS = (1.0, 1.25, 1.5, 1.75)
# How much of a large rung may be text: prompts are the rest.
_TEXT_SHARES = (0.75, 0.82, 0.9, 1.0)
# Rows may be so short on average. A row more is a few empty thread blocks in every layer.
_SHORTEST_MEAN = 24
# Positions of the longest row: a rung for short rows saves the rest of every attention's grid.
_SHORT = 256


class Ladder:
    """The rungs of one signature.

    Args:
        max_positions: of a batch, prompts included.
        longest: positions of the longest row that any adapter takes, its prompt included.

    Attributes:
        rungs: cheapest first.
    """

    def __init__(self, signature: Signature, *, max_positions: int, longest: int) -> None:
        rungs = [
            _caps(signature, positions=positions, tokens=int(share * positions), longest=most)
            for positions in _sizes(max_positions)
            for share in (_TEXT_SHARES if positions > _LAUNCH_BOUND else (1.0,))
            for most in sorted({min(positions, _SHORT, longest), min(positions, longest)})
        ]
        self.rungs = sorted(rungs, key=cost)
        self._costs = [cost(caps) for caps in self.rungs]

    def cheapest(self, need: Caps) -> Caps | None:
        """The first rung that holds a batch of this need."""
        # Whatever holds it costs as much as it does.
        first = bisect_left(self._costs, cost(need))
        return next((caps for caps in self.rungs[first:] if caps.hold(need)), None)


def cost(caps: Caps) -> int:
    """What a rung's time grows with."""
    return caps.tokens + sum(caps.expanded) + caps.longest // 8


def _sizes(most: int) -> Iterator[int]:
    yield from (size for size in _SMALL if size < most)
    octave = _LAUNCH_BOUND
    while octave < most:
        for step in _STEPS:
            if _LAUNCH_BOUND < (size := int(octave * step)) < most:
                yield size
        octave *= 2
    yield most


def _caps(signature: Signature, *, positions: int, tokens: int, longest: int) -> Caps:
    rows = max(4, positions // _SHORTEST_MEAN)
    return Caps(
        rows=rows,
        tokens=tokens,
        expanded=(positions,) * len(signature.stops),
        reads=positions if signature.mean else rows,
        longest=longest,
        tiles=tokens // TILE + rows,
    )
