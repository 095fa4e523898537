"""Which sizes of batches are captured as CUDA graphs. Knows no device.

A graph runs at the size that it was captured with, so a batch runs on the cheapest rung that holds
it. Rungs are dense where a token costs time and sparse where launching is all that there is to pay.
"""

from collections.abc import Iterator

from adapters.plan import TILE, Caps, Signature

# Below so many positions a forward pass takes the time of its launches, whatever their number.
_LAUNCH_BOUND = 1024
_SMALL = (64, 256, _LAUNCH_BOUND)
_STEPS = (1.0, 1.5)
# How much of a large rung may be text: prompts are the rest.
_TEXT_SHARES = (0.7, 0.85, 1.0)
# Rows may be so short on average. A row more is a few empty thread blocks in every layer.
_SHORTEST_MEAN = 24
# Positions of the longest row: a rung for short rows saves the rest of every attention's grid.
_SHORT = 256


def ladder(signature: Signature, *, max_positions: int, longest: int) -> list[Caps]:
    """The rungs of one signature, cheapest first.

    Args:
        max_positions: of a batch, prompts included.
        longest: positions of the longest row that any adapter takes, its prompt included.
    """
    rungs = []
    for positions in _sizes(max_positions):
        shares = _TEXT_SHARES if positions > _LAUNCH_BOUND else (1.0,)
        lengths = sorted({min(positions, _SHORT, longest), min(positions, longest)})
        for share in shares:
            for most in lengths:
                rungs.append(
                    _caps(
                        signature, positions=positions, tokens=int(share * positions), longest=most
                    )
                )
    return sorted(rungs, key=cost)


def cost(caps: Caps) -> int:
    """What a rung's time grows with."""
    return caps.tokens + sum(caps.expanded) + caps.longest // 8


def cheapest(rungs: list[Caps], need: Caps) -> int | None:
    """The index of the first rung that holds a batch of this need; they are sorted by cost."""
    for index, caps in enumerate(rungs):
        if caps.hold(need):
            return index
    return None


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
