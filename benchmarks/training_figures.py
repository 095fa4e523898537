"""What `training` shows and writes: ratios over the rivals at their best, and the targets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.packed_training import Packed
from benchmarks.padded_training import Kind, Padded
from benchmarks.report import Report, spread
from benchmarks.training_memory import Memory
from benchmarks.turns import ratio

_COLUMNS = (
    "system",
    "s an epoch",
    "texts/s",
    "x PEFT prompt tuning",
    "x PEFT LoRA",
    "s to fill, once",
    "peak MiB",
    "of PEFT LoRA's",
    "beside the model",
    "of PEFT LoRA's",
)
# By what: times as fast as prompt tuning or LoRA, share of LoRA's peak.
_CACHED_OVER_PROMPT_TUNING, _CACHED_OVER_LORA, _UNCACHED_OVER_PROMPT_TUNING = 3.0, 2.0, 1.5
_OF_LORAS_PEAK = 0.5
# Texts/s that are shown without decimals.
_WHOLE = 100


@dataclass(frozen=True, slots=True)
class Figures:
    """One system's. texts_per_second: by round. first_loss: of the epoch that warmed up.

    fill_seconds: what its cache took, once and outside of the epochs. memory: bytes.
    """

    texts_per_second: Sequence[float]
    first_loss: float
    fill_seconds: float
    memory: Memory


@dataclass(frozen=True, slots=True)
class Contest:
    """Everybody's figures by name, from the same rounds over the same rows.

    A rival that was run in several precisions is compared with in its fastest one; and, where it
    is about memory, in the one that takes least.
    """

    rows: int
    figures: Mapping[str, Figures]
    rivals: Sequence[Padded]
    cached: Packed
    uncached: Packed

    def report(self, conditions: Mapping[str, Any]) -> Report:
        """The table, and everything behind it."""
        systems = {name: self._described(name) for name in self.figures}
        lines = [_line(name, found) for name, found in systems.items()]
        targets = self._targets(systems)
        met = {
            f"target: {name}": f"{wanted:g} wanted, {found:.2f} measured"
            for name, (wanted, found) in targets.items()
        }
        content = {
            "systems": systems,
            "targets": {
                name: {"wanted": wanted, "measured": found}
                for name, (wanted, found) in targets.items()
            },
        }
        return Report("training", _COLUMNS, lines, content, {**conditions, **met})

    def _described(self, name: str) -> dict[str, Any]:
        figures = self.figures[name]
        memory = figures.memory
        loras = [self.figures[rival].memory for rival in self._names(Kind.LORA)]
        return {
            "seconds_per_epoch": spread([self.rows / rate for rate in figures.texts_per_second]),
            "texts_per_second": spread(figures.texts_per_second),
            "times_prompt_tuning": self._times(name, Kind.PROMPT_TUNING),
            "times_lora": self._times(name, Kind.LORA),
            "fill_seconds": figures.fill_seconds,
            "first_loss": figures.first_loss,
            "memory_bytes": asdict(memory) | {"above": memory.above},
            "peak_of_loras": memory.peak / min(lora.peak for lora in loras),
            "above_of_loras": memory.above / min(lora.above for lora in loras),
        }

    def _times(self, name: str, kind: Kind) -> float:
        """How many times as fast as this rival in its fastest precision."""
        rates = {rival: self.figures[rival].texts_per_second for rival in self._names(kind)}
        fastest = max(rates.values(), key=median)
        return ratio(self.figures[name].texts_per_second, fastest)

    def _names(self, kind: Kind) -> list[str]:
        return [rival.name for rival in self.rivals if rival.kind is kind]

    def _targets(self, systems: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
        """What was wanted and what was measured."""
        cached, uncached = systems[self.cached.name], systems[self.uncached.name]
        return {
            "kept in memory over PEFT prompt tuning, at least": (
                _CACHED_OVER_PROMPT_TUNING,
                cached["times_prompt_tuning"],
            ),
            "kept in memory over PEFT LoRA, at least": (_CACHED_OVER_LORA, cached["times_lora"]),
            "uncached over PEFT prompt tuning, at least": (
                _UNCACHED_OVER_PROMPT_TUNING,
                uncached["times_prompt_tuning"],
            ),
            "peak memory of PEFT LoRA's, kept in memory, at most": (
                _OF_LORAS_PEAK,
                cached["peak_of_loras"],
            ),
        }


def _line(name: str, found: Mapping[str, Any]) -> list[str]:
    memory, rate = found["memory_bytes"], found["texts_per_second"]["median"]
    return [
        name,
        f"{found['seconds_per_epoch']['median']:.2f}",
        f"{rate:,.0f}" if rate >= _WHOLE else f"{rate:.1f}",
        f"{found['times_prompt_tuning']:.2f}",
        f"{found['times_lora']:.2f}",
        f"{found['fill_seconds']:.2f}" if found["fill_seconds"] else "-",
        f"{memory['peak'] >> 20:,}",
        f"{found['peak_of_loras']:.2f}",
        f"{memory['above'] >> 20:,}",
        f"{found['above_of_loras']:.2f}",
    ]
