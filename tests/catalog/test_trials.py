"""Whether a second revision is taken back: its limits, chance, and what is shown of it."""

import random
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pytest

from adapters.format.spec import AdapterSpec
from adapters.format.store import Revision
from service.catalog.entry import CatalogEntry
from service.catalog.traffic import Rule, Traffic
from service.catalog.trials import Trials, judge, wilson
from service.engine.observer import Observer
from service.engine.trials import MAX_DIRECTIONS, Cause, Pair
from tests.support.tiny_models import make_backbone, make_spec

FIRST, SECOND = "a" * 64, "b" * 64
NONE = Rule(None, None, None, min_texts=1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Tried:
    """A name `spam` with two revisions and a clock that stands still."""

    def __init__(
        self,
        rule: Rule,
        *,
        shadow: bool = False,
        labels: tuple[str, ...] = ("ham", "spam"),
        make: Callable[..., AdapterSpec] = make_spec,
        **fields: object,
    ) -> None:
        self.clock = Clock()
        self.trials = Trials(Observer(), self.clock)
        self.verdicts: list[tuple[Cause, str]] = []
        self.trials.on_verdict = lambda _name, _traffic, *verdict: self.verdicts.append(verdict)
        spec = make(make_backbone(), labels=labels, **fields)
        self.entry = CatalogEntry(
            "spam",
            FIRST,
            tuple(Revision(item, datetime.now(UTC), 1) for item in (FIRST, SECOND)),
            {FIRST: spec, SECOND: spec},
            traffic=Traffic(SECOND, FIRST, 50, shadow, rule),
        )
        self.trials.follow("spam", self.entry)

    def read(self, role: str, texts: int = 1, seconds: float | None = None) -> None:
        self.trials.read("spam", SECOND, role, texts, seconds)  # type: ignore[arg-type]

    def fail(self, texts: int = 1, *, role: str = "canary", revision: str = SECOND) -> None:
        self.trials.failed("spam", SECOND, revision, role, texts)  # type: ignore[arg-type]

    def compare(self, before: int, after: int, texts: int = 1) -> None:
        """Texts with these best labels."""
        spec = self.entry.specs[FIRST]

        def scores(best: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
            found = np.full(len(spec.labels), 0.1, dtype=np.float32)
            found[best] = 0.9
            return found

        self.trials.compared("spam", SECOND, [Pair(scores(before), scores(after))] * texts)


def test_the_interval_is_wilsons() -> None:
    # From the example of Brown, Cai and DasGupta (2001) and by hand.
    low, high = wilson(10, 100, z=1.96)
    assert low == pytest.approx(0.0552, abs=1e-4)
    assert high == pytest.approx(0.1744, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    for count, of in ((0, 5), (5, 5), (7, 5), (3, 1000)):
        low, high = wilson(count, of)
        assert 0 <= low <= min(1.0, count / of) <= high + 1e-12 <= 1 + 1e-12


def test_a_candidate_that_fails_is_taken_back_soon() -> None:
    tried = Tried(Rule(min_texts=10))
    for texts in range(1, 11):
        assert not tried.verdicts
        tried.fail()
        tried.read("canary")
        assert bool(tried.verdicts) == (texts == 10)
    ((cause, reason),) = tried.verdicts
    assert cause == "errors"
    assert "10 of 10 texts failed" in reason
    assert "2.0%" in reason


def test_a_device_that_fails_both_revisions_takes_none_back() -> None:
    tried = Tried(Rule())
    for _ in range(200):
        tried.read("current")
        tried.read("canary")
        tried.fail(role="current", revision=FIRST)
        tried.fail()
    assert not tried.verdicts


def test_the_current_revision_that_fails_beside_an_answer_is_no_fault_of_the_candidate() -> None:
    tried = Tried(Rule())
    for _ in range(200):
        tried.read("canary")
        tried.read("shadow")
        tried.fail(role="shadow", revision=FIRST)
    assert not tried.verdicts
    assert tried.trials.figures("spam").shadow.errors == 200  # type: ignore[union-attr]


def test_a_shadow_that_fails_is_taken_back() -> None:
    tried = Tried(Rule(), shadow=True)
    for _ in range(40):
        tried.read("shadow")
        tried.fail(role="shadow")
    assert [cause for cause, _ in tried.verdicts] == ["errors"]


def test_disagreement_takes_back_once_and_names_its_direction() -> None:
    tried = Tried(Rule(max_disagreement=0.1))
    tried.compare(0, 0, 60)
    tried.compare(0, 1, 35)
    tried.compare(1, 0, 5)
    tried.compare(0, 1, 100)
    assert [cause for cause, _ in tried.verdicts] == ["disagreement"]
    figures = tried.trials.figures("spam")
    assert figures is not None
    assert (figures.compared, figures.disagreements) == (200, 140)
    assert [(item.before, item.after, item.texts) for item in figures.directions] == [
        ("ham", "spam", 135),
        ("spam", "ham", 5),
    ]
    # 0.1 instead of 0.9 for the current one's best label, in 140 of 200 texts.
    assert figures.score_difference == pytest.approx(-0.8 * 140 / 200)


def test_a_slow_canary_is_taken_back_and_a_slow_shadow_only_shown() -> None:
    for role, expected in (("canary", ["latency"]), ("shadow", [])):
        tried = Tried(Rule(max_latency_ratio=2.0), shadow=role == "shadow")
        source = random.Random(1)
        for _ in range(100):
            tried.read("current", seconds=0.010 * source.lognormvariate(0, 0.3))
            tried.read(role, seconds=0.025 * source.lognormvariate(0, 0.3))
        assert [cause for cause, _ in tried.verdicts] == expected
        figures = tried.trials.figures("spam")
        assert figures is not None
        reading = figures.canary if role == "canary" else figures.shadow
        assert reading.latency_ms == pytest.approx(25, rel=0.15)


def test_a_limit_that_is_off_takes_nothing_back() -> None:
    tried = Tried(NONE)
    for _ in range(300):
        tried.read("current", seconds=0.001)
        tried.read("canary", seconds=1.0)
        tried.fail()
        tried.compare(0, 1)
    assert not tried.verdicts


def test_what_is_older_than_the_window_does_not_count() -> None:
    tried = Tried(Rule(max_disagreement=0.5, window_seconds=60))
    tried.compare(0, 0, 1000)
    tried.clock.now += 61
    tried.compare(0, 1, 40)
    assert [cause for cause, _ in tried.verdicts] == ["disagreement"]
    assert tried.trials.figures("spam").compared == 40  # type: ignore[union-attr]


@pytest.mark.parametrize("limit", [0.02, 0.2, 0.5])
def test_chance_alone_takes_hardly_anything_back(limit: float) -> None:
    """Candidates whose true rate is the limit itself, judged after each of a thousand texts."""
    source, taken_back, trials = random.Random(7), 0, 300
    rule = Rule(max_error_rate=None, max_disagreement=limit)
    for _ in range(trials):
        differing = 0
        for texts in range(1, 1001):
            differing += source.random() < limit
            if texts % 5 == 0 and judge(
                rule,
                tried=0,
                wrong=0,
                current=0,
                current_wrong=0,
                compared=texts,
                differing=differing,
            ):
                taken_back += 1
                break
    assert taken_back <= 0.03 * trials


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "texts"), [(0.4, 200), (0.6, 60), (1.0, 30)])
def test_what_is_clearly_worse_is_taken_back_within_few_texts(rate: float, texts: int) -> None:
    """A limit of 0.2: nearly every trial ends within so many texts."""
    source, ended = random.Random(3), 0
    for _ in range(100):
        tried = Tried(Rule())
        for _ in range(texts):
            tried.compare(0, int(source.random() < rate))
        ended += bool(tried.verdicts)
    assert ended >= 90


def test_the_directions_are_bounded() -> None:
    labels = tuple(f"label {number}" for number in range(60))
    tried = Tried(NONE, labels=labels)
    for number in range(50):
        tried.compare(number, number + 1)
    figures = tried.trials.figures("spam")
    assert figures is not None
    assert figures.directions[0].texts == 50 - MAX_DIRECTIONS
    assert figures.directions[0].before == "(other)"


def test_sets_of_labels_differ_by_the_labels_that_are_lost_and_won() -> None:
    tried = Tried(NONE, labels=("x", "y", "z"), activation="sigmoid")
    scores = np.array([0.9, 0.9, 0.1], np.float32), np.array([0.1, 0.9, 0.9], np.float32)
    tried.trials.compared("spam", SECOND, [Pair(*scores), Pair(scores[0], scores[0])])
    figures = tried.trials.figures("spam")
    assert figures is not None
    assert (figures.compared, figures.disagreements) == (2, 1)
    assert {(item.before, item.after) for item in figures.directions} == {("x", ""), ("", "z")}


def test_figures_stay_after_the_end_and_go_with_another_trial() -> None:
    tried = Tried(Rule())
    tried.compare(0, 1, 100)
    traffic = tried.entry.traffic
    assert traffic is not None
    tried.trials.follow("spam", replaced(tried.entry, traffic.end("disagreement", "too many")))
    # Reports that come late.
    tried.compare(0, 1, 1)
    figures = tried.trials.figures("spam")
    assert figures is not None
    assert figures.disagreements >= 100
    tried.trials.follow("spam", tried.entry)
    assert tried.trials.figures("spam").compared == 0  # type: ignore[union-attr]
    tried.trials.follow("spam", None)
    assert tried.trials.figures("spam") is None


def test_more_percent_of_the_same_revision_keeps_what_was_seen() -> None:
    tried = Tried(NONE)
    tried.compare(0, 0, 10)
    grown = replaced(tried.entry, Traffic(SECOND, FIRST, 80, rule=NONE))
    tried.trials.follow("spam", grown)
    assert tried.trials.figures("spam").compared == 10  # type: ignore[union-attr]


def replaced(entry: CatalogEntry, traffic: Traffic) -> CatalogEntry:
    return CatalogEntry(entry.name, entry.current, entry.revisions, entry.specs, traffic=traffic)
