"""What the demo asks, and how often. Its sentences are made up here, from no data set."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.client import Input

WAVE_SECONDS, WAVE_HEIGHT = 120.0, 0.6
BURST_EVERY_SECONDS, BURST_SECONDS, BURST_TIMES = 20.0, 3.0, 4.0
SIZES = (1, 1, 1, 1, 2, 3, 4, 8, 16, 32)
# Longer than any adapter reads.
LONG_WORDS = 600

PATTERNS = (
    "could you {do} my {thing} {when}?",
    "why was my {thing} {done} {when}, and who do I ask about it",
    "the {thing} is {how}, and I would {do} it again {when}",
    "WIN a free {thing}! Reply YES {when} to {do} yours now",
    "a {how} film about a {thing} that was {done} {when}",
    "please {do} the {thing} for two people {when}",
    "my {thing} was {done}; what a {how} week",
)
WORDS = {
    "do": ("book", "cancel", "change", "claim", "find", "order", "track", "unlock"),
    "done": ("charged twice", "delivered", "forgotten", "lost", "refused", "stolen", "turned down"),
    "how": ("charming", "dull", "fine", "hopeless", "lovely", "slow", "surprising", "tired"),
    "thing": ("alarm", "bank card", "flight", "parcel", "pin", "playlist", "table", "transfer"),
    "when": ("at six", "before lunch", "last week", "next Monday", "today", "tomorrow night"),
}


def times_at(elapsed: float) -> float:
    """How many times the average rate, so many seconds after the start: a slow wave, and bursts."""
    wave = 1 + WAVE_HEIGHT * math.sin(2 * math.pi * elapsed / WAVE_SECONDS)
    in_burst = elapsed % BURST_EVERY_SECONDS > BURST_EVERY_SECONDS - BURST_SECONDS
    return wave * BURST_TIMES if in_burst else wave


@dataclass(frozen=True, slots=True)
class Mixture:
    """Inputs for these adapters, the first of them most: by Zipf's law."""

    names: Sequence[str]
    chance: random.Random

    def inputs(self) -> list["Input"]:
        """Of one request: 1 to 32, one of ten a pair, one of a hundred too long."""
        return [
            self.long_input() if self.chance.random() < 0.01 else self._input(self._sentence())
            for _ in range(self.chance.choice(SIZES))
        ]

    def long_input(self) -> "Input":
        """One text that its adapter cuts, or refuses to."""
        text = self._sentence()
        while text.count(" ") < LONG_WORDS:
            text += " " + self._sentence()
        return self._input(text)

    def _input(self, text: str) -> "Input":
        from service.client import Input

        (name,) = self.chance.choices(self.names, [1 / (1 + i) for i in range(len(self.names))])
        pair = self._sentence() if self.chance.random() < 0.1 else None
        return Input(text, text_pair=pair, adapter=name)

    def _sentence(self) -> str:
        words = {kind: self.chance.choice(choices) for kind, choices in WORDS.items()}
        return self.chance.choice(PATTERNS).format(**words)
