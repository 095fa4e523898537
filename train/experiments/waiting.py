"""Which cell runs next. Knows no process."""

from collections.abc import Sequence

from train.experiments.cells import Plan
from train.experiments.store import Outcome


class Waiting:
    """Plans that nobody runs yet: seed by seed, so that what is stopped leaves whole tables of some
    seeds, and within one the longest first: a long one at the end would run alone."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        seeds = list(dict.fromkeys(plan.cell.seed for plan in plans))
        self.plans = sorted(plans, key=lambda plan: (seeds.index(plan.cell.seed), -plan.cost))
        self._unfinished = {plan.cell for plan in plans}

    def first(self) -> Plan | None:
        """The next one that can be run: one that starts from no unfinished cell."""
        return next((plan for plan in self.plans if plan.after not in self._unfinished), None)

    def take(self, plan: Plan) -> None:
        """Somebody runs it now."""
        self.plans.remove(plan)

    def ended(self, outcome: Outcome) -> list[Plan]:
        """A cell is over; takes and returns the plans that can never be run now."""
        self._unfinished.remove(outcome.cell)
        if outcome.failure is None:
            return []
        lost = [plan for plan in self.plans if plan.after == outcome.cell]
        for plan in lost:
            self.take(plan)
        return lost
