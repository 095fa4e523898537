"""One sentence that a comparison ends in: which method to take, and what speaks against it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.experiments.differences import Spread, mean_spread


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method, its scores by task, and the mean number of its trained parameters.

    served: whether an adapter file holds what it trains.
    """

    method: str
    scores: Mapping[str, Spread]
    parameters: float
    served: bool = True

    @property
    def mean(self) -> Spread:
        """Over all tasks."""
        return mean_spread(list(self.scores.values()))


def advice(candidates: Sequence[Candidate], majority: float) -> str:
    """The smallest of the served methods than which none of them is better by more than chance.

    Args:
        candidates: at least one, all with the same tasks.
        majority: the mean score of always giving the same answer.
    """
    served = [each for each in candidates if each.served]
    if not served:
        return "None of these methods can be served as an adapter: compare some that can."
    best = max(served, key=lambda each: each.mean.value)
    gain = best.mean.minus(majority)
    if gain.low <= 0:
        return (
            f"Take none of these methods yet: the best one, {best.method}, does not beat always "
            f"giving the same answer by more than chance ({_points(gain.value)} points), so the "
            "labels, the number of rows or the backbone have to change first."
        )
    level = [each for each in served if not best.mean.minus(each.mean).is_real]
    taken = min(level, key=lambda each: (each.parameters, -each.mean.value))
    size = f"{taken.parameters:,.0f} trained parameters"
    parts = [f"Take {taken.method} ({size}): {_why(taken, best, level)}"]
    if worse := _worse_on(taken, served):
        parts.append(f"but {worse}")
    above = [each for each in candidates if not each.served]
    for other in above:
        difference = other.mean.minus(taken.mean)
        if difference.low > 0:
            parts.append(
                f"{other.method}, which cannot be served, is {_points(difference.value)} points "
                "better"
            )
    return "; ".join(parts) + "."


def _why(taken: Candidate, best: Candidate, level: Sequence[Candidate]) -> str:
    over = (
        "on average over the tasks" if len(taken.scores) > 1 else f"on {next(iter(taken.scores))}"
    )
    if len(level) == 1:
        return f"{over} it is better than each of the others by more than chance"
    if taken is best:
        return (
            f"{over} none is better, and {_names(level, taken)}, which "
            f"{'is' if len(level) == 2 else 'are'} larger, cannot be told apart from it"
        )
    ahead = _points(best.mean.minus(taken.mean).value)
    return (
        f"{over} {best.method} is {ahead} points better, which is not more than chance, and "
        f"{taken.method} is the smallest that cannot be told apart from it"
    )


def _names(level: Sequence[Candidate], taken: Candidate) -> str:
    names = [each.method for each in level if each is not taken]
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _worse_on(taken: Candidate, served: Sequence[Candidate]) -> str:
    """The tasks on which another method is better by more than chance, with the best of them."""
    if len(taken.scores) == 1:
        return ""
    found = []
    for task, score in taken.scores.items():
        best = max(served, key=lambda each, name=task: each.scores[name].value)  # type: ignore[misc]
        difference = best.scores[task].minus(score)
        if difference.low > 0:
            found.append(f"{best.method} is {_points(difference.value)} better on {task}")
    return ", ".join(found)


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
