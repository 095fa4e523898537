"""Drift where a host has several devices: the engines beside the first one have no counts.

Each works out the bins of the texts that it has answered and sends those to the first engine, which
counts them all. Of uncertain texts it asks for its own least certain ones; the first engine keeps
those that are so among all.
"""

from collections.abc import Sequence
from itertools import count

from service.drift.interface import UncertainText
from service.drift.monitor import DriftMonitor
from service.drift.uncertain import UncertainTexts
from service.engine.interface import AdapterKey
from service.engine.observer import Observer

# Texts that wait to be sent; what is beyond is not counted.
_MOST_WAITING = 20_000


class FurtherMonitor(DriftMonitor):
    """Takes the place of a monitor in the process of a further engine.

    Args:
        texts, uncertain: as of `DriftMonitor`, of the same settings as the first engine's.
    """

    def __init__(self, *, texts: int, uncertain: UncertainTexts) -> None:
        super().__init__(Observer(), texts=texts, uncertain=uncertain)
        self._waiting: list[tuple[str, str, list[int]]] = []
        self._numbers = count()

    def begin(self) -> None:
        """The first engine may be another one, which keeps no texts yet."""
        for name in self._followed:
            self.uncertain.forget(name)

    def take(self) -> list[tuple[str, str, list[int]]]:
        """The texts that were answered since the last call: name, revision and bins."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _add(self, key: AdapterKey, bins: Sequence[int]) -> None:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append((key.name, key.revision, list(bins)))

    def _wants(self, key: AdapterKey, certainty: float) -> bool:
        wanted = super()._wants(key, certainty)
        if wanted:
            # In place of the text, which is not known here: the next one must be less certain.
            number = str(next(self._numbers))
            self.uncertain.add(
                UncertainText(key.name, key.revision, number, None, "", certainty, (), "")
            )
        return wanted
