"""Holding texts out of data whose texts have sets of labels, so that every label keeps its share.

Iterative stratification: Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label
Data, ECML PKDD 2011. The rarest label's texts are divided first, because later divisions cannot
correct its share. Texts without labels are divided like the texts of one more label.
"""

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

# Stands for having no label: no label is empty.
_NONE = ""


def hold_out_texts(
    labels_of: Mapping[T, Sequence[str]], fraction: float, generator: random.Random
) -> set[T]:
    """Texts to hold out: about `fraction` of all texts, and of each label's.

    Every label keeps a text that is not held out. At least one text is held out if one can be.

    Args:
        labels_of: each text's labels, distinct; perhaps none.
    """
    division = _Division(labels_of, fraction, generator)
    division.divide()
    division.round_up(max(1, round(fraction * len(labels_of))), generator)
    return division.held_out


class _Division(Generic[T]):
    """Which texts are held out so far.

    Args:
        labels_of, fraction: as `hold_out_texts`.
        generator: shuffles the texts.
    """

    def __init__(
        self, labels_of: Mapping[T, Sequence[str]], fraction: float, generator: random.Random
    ) -> None:
        self.held_out: set[T] = set()
        self._labels_of = {text: tuple(labels) or (_NONE,) for text, labels in labels_of.items()}
        self._texts: dict[str, list[T]] = {}
        for text, labels in self._labels_of.items():
            for label in labels:
                self._texts.setdefault(label, []).append(text)
        for texts in self._texts.values():
            generator.shuffle(texts)
        # How many more texts of each label the held out part wants, and the kept part.
        self._wants = {label: fraction * len(texts) for label, texts in self._texts.items()}
        self._keeps = {label: (1 - fraction) * len(texts) for label, texts in self._texts.items()}
        # Texts of each label that are not held out, placed or not.
        self._kept = Counter({label: len(texts) for label, texts in self._texts.items()})

    def divide(self) -> None:
        """Place every text, label by label."""
        unplaced = {label: len(texts) for label, texts in self._texts.items()}
        placed: set[T] = set()
        while unplaced:
            rarest = min(unplaced, key=lambda label: (unplaced[label], label))
            for text in self._texts[rarest]:
                if text in placed:
                    continue
                placed.add(text)
                if self._wants[rarest] > self._keeps[rarest] and self._may_go(text):
                    self._hold_out(text)
                else:
                    for label in self._labels_of[text]:
                        self._keeps[label] -= 1
                for label in self._labels_of[text]:
                    unplaced[label] -= 1
            del unplaced[rarest]

    def round_up(self, count: int, generator: random.Random) -> None:
        """Hold out more texts, up to `count`: labels of few texts want less than one of them.

        Those first whose labels want the most; none whose labels want no more, unless it is the
        only text held out.
        """
        texts = [text for text in self._labels_of if text not in self.held_out]
        generator.shuffle(texts)
        texts.sort(key=lambda text: -sum(self._wants[label] for label in self._labels_of[text]))
        for text in texts:
            wanted = all(self._wants[label] > 0 for label in self._labels_of[text])
            if len(self.held_out) < count and wanted and self._may_go(text):
                self._hold_out(text)
        if not self.held_out:
            self.held_out.update([text for text in texts if self._may_go(text)][:1])

    def _hold_out(self, text: T) -> None:
        self.held_out.add(text)
        for label in self._labels_of[text]:
            self._wants[label] -= 1
            self._kept[label] -= 1

    def _may_go(self, text: T) -> bool:
        return all(self._kept[label] > 1 for label in self._labels_of[text])
