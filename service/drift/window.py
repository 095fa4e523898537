"""The last texts of one revision, as counts in bins."""

from array import array
from collections.abc import Sequence

# Of a half: the counts are 16 bits wide, for ten thousand adapters' sake.
MOST_TEXTS = 2**16 - 2


class Window:
    """Counts the last texts, in two halves. When a half is full, the older one is forgotten.

    So it holds between a half and all of the texts that it may. Each count takes two bytes.

    Args:
        bins: how many there are.
        texts: the most that are counted, at least 2.
    """

    __slots__ = ("_before", "_half", "_now", "_since_before", "_since_now", "_texts_before")
    _before: "array[int]"
    _now: "array[int]"

    def __init__(self, bins: int, texts: int) -> None:
        assert 2 <= texts <= 2 * MOST_TEXTS
        self._half = texts // 2
        # The last place counts the texts themselves.
        self._before = array("H", bytes(2 * (bins + 1)))
        self._now = array("H", bytes(2 * (bins + 1)))
        self._since_before: float | None = None
        self._since_now: float | None = None

    def add(self, bins: Sequence[int], now: float) -> None:
        """Count one text. now: seconds since the epoch."""
        counts = self._now
        if counts[-1] == self._half:
            self._before, self._since_before = counts, self._since_now
            counts = self._now = array("H", bytes(2 * len(counts)))
            self._since_now = None
        if self._since_now is None:
            self._since_now = now
        for at in bins:
            counts[at] += 1
        counts[-1] += 1

    @property
    def texts(self) -> int:
        return self._before[-1] + self._now[-1]

    @property
    def since(self) -> float | None:
        """When the first of these texts was counted; None without any."""
        return self._since_now if self._since_before is None else self._since_before

    def counts(self) -> list[int]:
        """By bin."""
        return [was + now for was, now in zip(self._before[:-1], self._now[:-1], strict=True)]
