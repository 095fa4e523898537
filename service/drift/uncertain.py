"""Texts of low confidence, kept in memory for a while so that a person can label them.

Each adapter keeps its least certain texts. All together are bounded in bytes: what was kept first
goes first.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np

from adapters.format.spec import AdapterSpec
from adapters.profiles import Scores
from service.drift.interface import UncertainText

# What a text takes beside its characters.
_OVERHEAD_BYTES = 600


def certainty_of(spec: AdapterSpec, scores: Scores) -> float:
    """How sure an answer is, from 0 to 1.

    Of one label: its score. Of a set of labels: how far the nearest score is from its threshold.
    """
    if not spec.multi_label:
        return float(scores.max())
    return float(np.abs(scores - np.array(spec.label_thresholds)).min())


class UncertainTexts:
    """The texts that are kept.

    Args:
        texts: the most of one adapter; 0: none are kept.
        max_bytes: of all of them.
        seconds: how long a text is kept.
    """

    def __init__(
        self, *, texts: int, max_bytes: int, seconds: float, clock: Callable[[], float] = monotonic
    ) -> None:
        self.most = texts
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        # In the order in which they were kept: by a number, when, and the text.
        self._kept: OrderedDict[int, tuple[float, UncertainText]] = OrderedDict()
        # By adapter: certainty and number, the least certain first.
        self._order: dict[str, list[tuple[float, int]]] = {}
        self._known: set[tuple[str, str, str | None]] = set()
        self._bytes = 0
        self._next = 0

    def __len__(self) -> int:
        return len(self._kept)

    def wants(self, name: str, certainty: float) -> bool:
        """Whether a text of this certainty would be kept."""
        order = self._order.get(name)
        return order is None or len(order) < self.most or certainty < order[-1][0]

    def add(self, text: UncertainText) -> None:
        """Keep a text, unless the same one is kept or there are enough that are less certain."""
        self.expire()
        name = text.adapter
        size = _size(text)
        known = (name, text.text, text.text_pair)
        if not self.most or size > self._max_bytes or known in self._known:
            return
        if not self.wants(name, text.certainty):
            return
        order = self._order.setdefault(name, [])
        insort(order, (text.certainty, self._next))
        self._kept[self._next] = self._clock(), text
        self._known.add(known)
        self._bytes += size
        self._next += 1
        if len(order) > self.most:
            self._remove(order[-1][1])
        while self._bytes > self._max_bytes:
            self._remove(next(iter(self._kept)))

    def texts(self, name: str) -> list[UncertainText]:
        """Those of a name, the least certain first."""
        self.expire()
        return [self._kept[number][1] for _, number in self._order.get(name, ())]

    def forget(self, name: str, *, but: Sequence[str] = ()) -> int:
        """Remove the texts of a name, and return how many there were.

        Args:
            but: revisions whose texts stay.
        """
        numbers = [
            number
            for _, number in self._order.get(name, ())
            if self._kept[number][1].revision not in but
        ]
        for number in numbers:
            self._remove(number)
        return len(numbers)

    def expire(self) -> None:
        """Remove what is too old. Call this also when nothing is added."""
        oldest = self._clock() - self._seconds
        while self._kept:
            number, (kept, _) = next(iter(self._kept.items()))
            if kept > oldest:
                return
            self._remove(number)

    def _remove(self, number: int) -> None:
        _, text = self._kept.pop(number)
        order = self._order[text.adapter]
        order.remove((text.certainty, number))
        if not order:
            del self._order[text.adapter]
        self._known.discard((text.adapter, text.text, text.text_pair))
        self._bytes -= _size(text)


def _size(text: UncertainText) -> int:
    # A character may take four bytes.
    return _OVERHEAD_BYTES + 4 * (len(text.text) + len(text.text_pair or ""))
