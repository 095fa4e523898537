"""The sizes that steps are padded to: buckets.

A CUDA graph runs at the sizes that it was captured with. So rows that only fill it up are added to
the texts of a step until it has the sizes of a bucket: rows, tokens, and with the prompts all
positions. A filler is a row like any other, and attention keeps rows apart; its loss does not
count, so its gradients are zero. Integers only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Tokens of the smallest and the largest bucket. A step beyond takes longer than its launches.
LEAST, MOST = 64, 32_768
# Buckets between two powers of two, by the lower one. A small step takes the time of its kernels'
# latency, whatever they compute, and every bucket costs a capture. Tokens cost time in a large one.
_STEPS = {LEAST: 2, 2048: 4, 8192: 8}
# Attention is launched for rows of this length or of the longest in the data, and the blocks of
# shorter rows end at once.
_SHORT = 256


@dataclass(frozen=True, slots=True)
class Bucket:
    """Steps of one bucket run the same kernels. longest: no row has more tokens."""

    rows: int
    tokens: int
    longest: int


@dataclass(frozen=True, slots=True)
class Padding:
    """A bucket, and the lengths of the rows that fill it up."""

    bucket: Bucket
    fillers: tuple[int, ...]


class Buckets:
    """The buckets of a data set.

    Args:
        batch_size: texts of a step, at most.
        longest: tokens of the data set's longest text. No filler is longer: the backbone may not
            read more.
    """

    def __init__(self, *, batch_size: int, longest: int) -> None:
        self._batch_size = batch_size
        self._longest = longest

    def padding(self, lengths: Sequence[int]) -> Padding | None:
        """The smallest bucket for texts of these lengths; None if there is none."""
        text, longest = sum(lengths), self._length(max(lengths))
        if longest < 2:
            # A filler takes at least one token, and this one no more.
            return None
        for tokens, gap in _sizes():
            # Enough fillers for all that a step can lack: the step did not fit the bucket below.
            spare = -(-gap // (longest - 1))
            bucket = Bucket(self._batch_size + spare, tokens, longest)
            fillers = bucket.rows - len(lengths)
            if tokens - text >= fillers:
                return Padding(bucket, _dealt(tokens - text, fillers))
        return None

    def _length(self, longest: int) -> int:
        return min(_SHORT, self._longest) if longest <= _SHORT else self._longest


def _sizes() -> Iterator[tuple[int, int]]:
    """Tokens of every bucket, ascending, and how far it is at most to the one below.

    The latter never falls, and so does no bucket's number of spare rows.
    """
    yield LEAST, LEAST
    octave, steps = LEAST, _STEPS[LEAST]
    while octave < MOST:
        steps = _STEPS.get(octave, steps)
        gap = octave // steps
        for tokens in range(octave + gap, 2 * octave + 1, gap):
            yield tokens, max(gap, LEAST)
        octave *= 2


def _dealt(tokens: int, rows: int) -> tuple[int, ...]:
    """Lengths of the rows, as equal as can be."""
    least, longer = divmod(tokens, rows)
    return (least + 1,) * longer + (least,) * (rows - longer)
