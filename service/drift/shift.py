"""How far a distribution has moved from another one: the population stability index.

PSI is the sum over bins of (q - p) ln(q / p), for the shares p before and q now. Chance alone makes
it positive: without drift, PSI / (1/n + 1/m) for n and m texts is distributed like chi-square with
one degree of freedom less than there are bins (Yurdakul and Naranjo, Statistical properties of the
population stability index, 2020). A value is called drift only where chance does not explain it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["stable", "moderate", "large"]
LEVELS: tuple[Level, ...] = ("stable", "moderate", "large")
# The usual limits of PSI.
MODERATE, LARGE = 0.1, 0.25
# Bins in which the smaller sample would have fewer texts are joined: chi-square holds from here on.
LEAST_EXPECTED = 5.0
# Of the standard normal distribution: chance exceeds a limit once in a thousand looks.
_Z = 3.09
# Added to every bin, so that an empty one has no infinite share (Jeffreys' prior).
_PSEUDO = 0.5


@dataclass(frozen=True, slots=True)
class Shift:
    """groups: the bins that were compared, as indices of those that were joined. reference, seen:
    each group's share. psi: the index. chance: what it stays under in all but one of a thousand
    looks, if nothing has changed."""

    groups: tuple[tuple[int, ...], ...]
    reference: tuple[float, ...]
    seen: tuple[float, ...]
    psi: float
    chance: float

    @property
    def level(self) -> Level:
        if self.psi <= max(MODERATE, self.chance):
            return "stable"
        return "moderate" if self.psi <= LARGE else "large"


def shift_of(reference: Sequence[int], seen: Sequence[int], *, ordered: bool) -> Shift:
    """Compare two counts of the same bins; neither is empty.

    Args:
        ordered: neighbouring bins are alike, so that a rare one is joined with its neighbour. Else
            all rare ones become one group, the last, and those that are always empty are left out.
    """
    before, now = sum(reference), sum(seen)
    pooled = [was + is_now for was, is_now in zip(reference, seen, strict=True)]
    least = LEAST_EXPECTED * (before + now) / min(before, now)
    groups = _neighbours(pooled, least) if ordered else _rare_together(pooled, least)
    was = [sum(reference[at] for at in group) for group in groups]
    are = [sum(seen[at] for at in group) for group in groups]
    more = _PSEUDO * len(groups)
    psi = 0.0
    for count_before, count_now in zip(was, are, strict=True):
        p = (count_before + _PSEUDO) / (before + more)
        q = (count_now + _PSEUDO) / (now + more)
        psi += (q - p) * log(q / p)
    return Shift(
        groups=tuple(groups),
        reference=tuple(count / before for count in was),
        seen=tuple(count / now for count in are),
        psi=psi,
        chance=(1 / before + 1 / now) * _chi_square(len(groups) - 1),
    )


def _neighbours(pooled: Sequence[int], least: float) -> list[tuple[int, ...]]:
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    texts = 0
    for at, count in enumerate(pooled):
        group.append(at)
        texts += count
        if texts >= least:
            groups.append(tuple(group))
            group, texts = [], 0
    if group:
        groups.append((*groups.pop(), *group) if groups else tuple(group))
    return groups


def _rare_together(pooled: Sequence[int], least: float) -> list[tuple[int, ...]]:
    groups: list[tuple[int, ...]] = [(at,) for at, count in enumerate(pooled) if count >= least]
    if rare := tuple(at for at, count in enumerate(pooled) if 0 < count < least):
        groups.append(rare)
    return groups


def _chi_square(freedom: int) -> float:
    """What a variable of so many degrees of freedom exceeds once in a thousand times.

    By Wilson and Hilferty's approximation: at most 3.1 % too high.
    """
    if freedom < 1:
        return 0.0
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + _Z * sqrt(part)) ** 3)
