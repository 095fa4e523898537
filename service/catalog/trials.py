"""What is seen of names that try a second revision, and whether that takes the revision back.

The engine reports to `Trials`, in the process that has it, so that all workers' texts are judged
together. The rule is that of the division (`service.catalog.traffic.Rule`). A limit is crossed only
if chance does not explain it: the whole confidence interval must lie beyond.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, log, sqrt
from time import monotonic

from adapters.format.spec import AdapterSpec
from service.catalog.entry import CatalogEntry
from service.catalog.traffic import Direction, Figures, Reading, Rule, Traffic
from service.engine.observer import Observer
from service.engine.trials import (
    MAX_DIRECTIONS,
    OTHER_LABEL,
    Cause,
    DropReason,
    Pair,
    Role,
    TrialListener,
)

# Of an interval's ends from the middle, in standard deviations. The rule looks after every text, so
# it has many chances to be wrong: with 3.3, rates that are at their limit cross it in about one
# trial of a hundred.
Z = 3.3
# A window moves on in so many steps.
_SLICES = 20
# In place of a label, for a text whose best score is too low to be an answer.
ABSTAINED = "(abstained)"
_SHOWN_DIRECTIONS = 10


def wilson(count: int, of: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    if of == 0:
        return 0.0, 1.0
    share, weight = min(count, of) / of, z * z / of
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * sqrt(share * (1 - share) / of + weight / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(slots=True)
class _Logs:
    """Logarithms of seconds: how many, their sum and that of their squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, seconds: float) -> None:
        value = log(max(seconds, 1e-6))
        self.count += 1
        self.total += value
        self.squares += value * value

    def join(self, other: "_Logs") -> None:
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def variance_of_mean(self) -> float:
        spread = max(0.0, self.squares - self.count * self.mean**2) / max(1, self.count - 1)
        return spread / self.count


@dataclass(slots=True)
class _Counts:
    """What was seen in some time. texts, errors, seconds: by role. wrong, tried: of the candidate,
    whether it answered or not."""

    since: float = 0.0
    texts: Counter[Role] = field(default_factory=Counter)
    errors: Counter[Role] = field(default_factory=Counter)
    seconds: dict[Role, _Logs] = field(default_factory=dict)
    dropped: int = 0
    tried: int = 0
    wrong: int = 0
    compared: int = 0
    differing: int = 0
    score_differences: float = 0.0
    scored: int = 0

    def join(self, other: "_Counts") -> None:
        self.texts.update(other.texts)
        self.errors.update(other.errors)
        for role, seconds in other.seconds.items():
            self.seconds.setdefault(role, _Logs()).join(seconds)
        self.dropped += other.dropped
        self.tried += other.tried
        self.wrong += other.wrong
        self.compared += other.compared
        self.differing += other.differing
        self.score_differences += other.score_differences
        self.scored += other.scored


class _Window:
    """Counts of the last seconds, forgotten in steps."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._slices: deque[_Counts] = deque()

    def at(self, now: float) -> _Counts:
        """The counts to which what happens now is added."""
        if not self._slices or now - self._slices[-1].since >= self.seconds / _SLICES:
            self._slices.append(_Counts(now))
        while self._slices[0].since < now - self.seconds:
            self._slices.popleft()
        return self._slices[-1]

    def total(self, now: float) -> _Counts:
        self.at(now)
        total = _Counts()
        for counts in self._slices:
            total.join(counts)
        return total


@dataclass(slots=True, eq=False)
class _Trial:
    """One division while it is in force, and after."""

    traffic: Traffic
    current: AdapterSpec
    candidate: AdapterSpec
    window: _Window
    directions: Counter[tuple[str, str]] = field(default_factory=Counter)
    judged: bool = False


class Trials(TrialListener):
    """All trials of this process.

    Attributes:
        on_verdict: called once for a trial whose rule takes its candidate back: the name, the
            division, the cause, and the reason in a sentence.
    """

    def __init__(self, observer: Observer, clock: Callable[[], float] = monotonic) -> None:
        self.on_verdict: Callable[[str, Traffic, Cause, str], None] = lambda *_: None
        self.on_unreadable: Callable[[str, str, str], None] = lambda *_: None
        self._observer = observer
        self._clock = clock
        self._trials: dict[str, _Trial] = {}

    def follow(self, name: str, entry: CatalogEntry | None) -> None:
        """A name has a new entry; None: it was deleted."""
        known = self._trials.get(name)
        split = None if entry is None else entry.split
        if entry is None or split is None:
            if known is None:
                return
            ended = entry.traffic if entry is not None else None
            if not known.judged or known.traffic.in_force:
                self._observer.trial_set(name, None, shadow=known.traffic.shadow)
                if ended is not None and ended.ended is not None:
                    self._observer.trial_ended(ended.ended.cause)
            if ended is None or ended.revision != known.traffic.revision:
                del self._trials[name]
            else:
                # Its figures stay, for whoever asks why.
                known.traffic, known.judged = ended, True
            return
        traffic, current = split.traffic, entry.spec
        assert current is not None, "a split has two revisions that can be served"
        if known is None or _is_another(known.traffic, traffic):
            window = _Window(traffic.rule.window_seconds)
            self._trials[name] = _Trial(traffic, current, split.spec, window)
        else:
            if traffic.rule != known.traffic.rule:
                known.judged = False
                if traffic.rule.window_seconds != known.window.seconds:
                    known.window = _Window(traffic.rule.window_seconds)
            known.traffic = traffic
        self._observer.trial_set(name, traffic.percent, shadow=traffic.shadow)

    def figures(self, name: str) -> Figures | None:
        """What was seen within the window of a name's division; None if there is none here."""
        trial = self._trials.get(name)
        if trial is None:
            return None
        counts = trial.window.total(self._clock())
        readings = {role: _reading(counts, role) for role in ("current", "canary", "shadow")}
        low, high = wilson(counts.differing, counts.compared)
        return Figures(
            **readings,
            dropped=counts.dropped,
            compared=counts.compared,
            disagreements=counts.differing,
            disagreement_rate=_rate(counts.differing, counts.compared),
            disagreement_low=low if counts.compared else None,
            disagreement_high=high if counts.compared else None,
            score_difference=(counts.score_differences / counts.scored if counts.scored else None),
            directions=tuple(
                Direction(before, after, texts)
                for (before, after), texts in trial.directions.most_common(_SHOWN_DIRECTIONS)
            ),
        )

    def read(
        self, name: str, candidate: str, role: Role, texts: int, seconds: float | None
    ) -> None:
        if (trial := self._trial(name, candidate)) is None:
            return
        self._observer.trial_read(name, role, texts, seconds)
        counts = trial.window.at(self._clock())
        counts.texts[role] += texts
        if seconds is not None:
            counts.seconds.setdefault(role, _Logs()).add(seconds)
        if role == "canary" or (role == "shadow" and trial.traffic.shadow):
            counts.tried += texts
            self._judge(name, trial)

    def failed(self, name: str, candidate: str, revision: str, role: Role, texts: int) -> None:
        if (trial := self._trial(name, candidate)) is None:
            return
        self._observer.trial_failed(name, role, texts)
        counts = trial.window.at(self._clock())
        counts.errors[role] += texts
        if revision == candidate:
            counts.wrong += texts
            self._judge(name, trial)

    def compared(self, name: str, candidate: str, pairs: Sequence[Pair]) -> None:
        if (trial := self._trial(name, candidate)) is None:
            return
        differences: list[float] = []
        differing: Counter[tuple[str, str]] = Counter()
        number = 0
        for pair in pairs:
            before = _answer(trial.current, pair.current.tolist())
            after = _answer(trial.candidate, pair.candidate.tolist())
            if before != after:
                number += 1
                differing.update(_directions(before, after))
            best = int(pair.current.argmax())
            label = trial.current.labels[best]
            if label in trial.candidate.labels:
                score = pair.candidate[trial.candidate.labels.index(label)]
                differences.append(float(score - pair.current[best]))
        self._observer.trial_compared(name, agreed=len(pairs) - number, disagreed=number)
        self._observer.trial_scores(name, differences)
        for (was, now), texts in differing.items():
            known = trial.directions
            if (was, now) not in known and len(known) >= MAX_DIRECTIONS:
                was = now = OTHER_LABEL
            known[was, now] += texts
            self._observer.trial_differed(name, was, now, texts)
        counts = trial.window.at(self._clock())
        counts.compared += len(pairs)
        counts.differing += number
        counts.score_differences += sum(differences)
        counts.scored += len(differences)
        self._judge(name, trial)

    def dropped(self, name: str, candidate: str, texts: int, reason: DropReason) -> None:
        if (trial := self._trial(name, candidate)) is not None:
            self._observer.trial_dropped(name, reason, texts)
            trial.window.at(self._clock()).dropped += texts

    def unreadable(self, name: str, revision: str, reason: str) -> None:
        if self._trial(name, revision) is not None:
            self.on_unreadable(name, revision, reason)

    def _trial(self, name: str, candidate: str) -> _Trial | None:
        """Reports may come after the end of their trial."""
        trial = self._trials.get(name)
        return trial if trial and trial.traffic.revision == candidate else None

    def _judge(self, name: str, trial: _Trial) -> None:
        if trial.judged:
            return
        counts = trial.window.total(self._clock())
        verdict = judge(
            trial.traffic.rule,
            tried=counts.tried,
            wrong=counts.wrong,
            current=counts.texts["current"],
            current_wrong=counts.errors["current"],
            compared=counts.compared,
            differing=counts.differing,
            current_seconds=counts.seconds.get("current"),
            candidate_seconds=counts.seconds.get("canary"),
        )
        if verdict is not None:
            trial.judged = True
            self.on_verdict(name, trial.traffic, *verdict)


def judge(
    rule: Rule,
    *,
    tried: int,
    wrong: int,
    current: int,
    current_wrong: int,
    compared: int,
    differing: int,
    current_seconds: _Logs | None = None,
    candidate_seconds: _Logs | None = None,
) -> tuple[Cause, str] | None:
    """The limit that was crossed, and how, in a sentence; None if none was.

    Errors count only as far as they are more than the current revision's: a device that fails both
    says nothing about one of them.
    """
    if rule.max_error_rate is not None and tried >= rule.min_texts:
        low, _ = wilson(wrong, tried)
        if low > max(rule.max_error_rate, _rate(current_wrong, current) or 0.0):
            return "errors", (
                f"{wrong} of {tried} texts failed, surely more than {low:.1%}; "
                f"the limit is {rule.max_error_rate:.1%}"
            )
    if rule.max_disagreement is not None and compared >= rule.min_texts:
        low, _ = wilson(differing, compared)
        if low > rule.max_disagreement:
            return "disagreement", (
                f"{differing} of {compared} texts got another answer, surely more than {low:.1%}; "
                f"the limit is {rule.max_disagreement:.1%}"
            )
    before, after = current_seconds, candidate_seconds
    if rule.max_latency_ratio is not None and before is not None and after is not None:
        if min(before.count, after.count) < rule.min_texts:
            return None
        ratio = after.mean - before.mean
        low = exp(ratio - Z * sqrt(before.variance_of_mean + after.variance_of_mean))
        if low > rule.max_latency_ratio:
            return "latency", (
                f"it takes {exp(ratio):.2f} times as long as the current revision, surely more "
                f"than {low:.2f}; the limit is {rule.max_latency_ratio:g}"
            )
    return None


def _is_another(before: Traffic, after: Traffic) -> bool:
    return not before.in_force or (before.revision, before.baseline, before.shadow) != (
        after.revision,
        after.baseline,
        after.shadow,
    )


def _answer(spec: AdapterSpec, scores: Sequence[float]) -> tuple[str, ...]:
    """The labels that a text gets: one, or a set of them."""
    if spec.multi_label:
        return tuple(spec.label_set(scores))
    best = max(range(len(scores)), key=scores.__getitem__)
    below = spec.abstain_below
    if below is not None and scores[best] < below:
        return (ABSTAINED,)
    return (spec.labels[best],)


def _directions(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    """From which label to which. For sets of labels, each that was lost or won alone: to or from
    an empty label."""
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    lost = [(label, "") for label in before if label not in after]
    return lost + [("", label) for label in after if label not in before]


def _reading(counts: _Counts, role: Role) -> Reading:
    seconds = counts.seconds.get(role)
    return Reading(
        texts=counts.texts[role],
        errors=counts.errors[role],
        latency_ms=None if seconds is None else round(1000 * exp(seconds.mean), 3),
    )


def _rate(count: int, of: int) -> float | None:
    return min(count, of) / of if of else None
