"""What the monitor counts of the engine's answers, and what it leaves out."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from adapters.backbone.model import Backbone
from adapters.format.spec import AdapterSpec
from adapters.profiles import profile_of
from adapters.tokenizer import Encoding
from service.drift.monitor import LEAST_TEXTS, NOT_COUNTED, DriftMonitor
from service.drift.uncertain import UncertainTexts
from service.engine.interface import AdapterKey, Entry, RowResult
from service.engine.observer import Observer
from tests.support.tiny_models import make_spec

WINDOW = 1600


class Recorded(Observer):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, dict[str, int]]] = []

    def drifted(self, adapter: str, texts: int, shifts: Sequence[tuple[str, float, int]]) -> None:
        self.calls.append((adapter, texts, {name: level for name, _, level in shifts}))


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def spec(backbone: Backbone) -> AdapterSpec:
    """With a profile of 500 texts of five tokens, half of them spam."""
    plain = make_spec(backbone)
    rows = [(scores(number % 2 == 0), ids(5)) for number in range(500)]
    return plain.model_copy(
        update={"profile": profile_of(plain, rows, unknown_id=1, source="test")}
    )


def monitor(observer: Observer, *, keeps: int = 0) -> DriftMonitor:
    uncertain = UncertainTexts(texts=keeps, max_bytes=2**20, seconds=60.0)
    made = DriftMonitor(observer, texts=WINDOW, uncertain=uncertain)
    made.unknown_id = 1
    return made


def scores(spam: bool, confidence: float = 0.97) -> npt.NDArray[np.float32]:
    best = [1 - confidence, confidence]
    return np.array(best if spam else best[::-1], dtype=np.float32)


def ids(length: int) -> npt.NDArray[np.int64]:
    return np.full(length, 7, dtype=np.int64)


def answer(
    to: DriftMonitor,
    texts: int,
    *,
    name: str = "a",
    revision: str = "1",
    length: int = 5,
    counted: bool = True,
) -> tuple[int, ...]:
    """One request of so many texts, half of them spam."""
    encoding = Encoding(ids(length), np.zeros(length, np.int64), False)
    key = AdapterKey(name, revision)
    entries = [Entry(key, encoding, length, counted=counted) for _ in range(texts)]
    rows = [RowResult(scores(number % 2 == 0)) for number in range(texts)]
    return to.answered(entries, rows)


def test_only_followed_revisions_and_sent_texts_are_counted(
    recorded: Recorded, spec: AdapterSpec
) -> None:
    made = monitor(recorded)
    made.follow("a", "1", {"1": spec})
    answer(made, 10)
    answer(made, 20, revision="0")
    answer(made, 40, name="b")
    answer(made, 80, name="(unpublished)")
    answer(made, 160, counted=False)
    assert made.report("a", "1").texts == 10
    for name, revision in (("a", "0"), ("b", "1")):
        report = made.report(name, revision)
        assert (report.texts, report.note) == (0, NOT_COUNTED)
    assert not recorded.calls


def test_metrics_come_at_the_first_comparison_and_then_once_in_a_while(
    recorded: Recorded, spec: AdapterSpec
) -> None:
    made = monitor(recorded)
    made.follow("a", "1", {"1": spec})
    answer(made, LEAST_TEXTS - 1)
    assert not recorded.calls
    answer(made, 1)
    stable = {"label": 0, "confidence": 0, "length": 0, "unknown": 0}
    assert recorded.calls == [("a", LEAST_TEXTS, stable)]
    for _ in range(10 * WINDOW):
        answer(made, 1)
    assert len(recorded.calls) == 1 + 10 * WINDOW // (WINDOW // 16)
    assert all(WINDOW / 2 <= texts <= WINDOW for _, texts, _ in recorded.calls[-100:])


def test_a_new_revision_begins_at_zero_and_a_tried_one_goes_on(
    recorded: Recorded, spec: AdapterSpec
) -> None:
    made = monitor(recorded)
    made.follow("a", "1", {"1": spec})
    answer(made, 150)
    made.follow("a", "1", {"1": spec, "2": spec})
    answer(made, 120, revision="2", length=50)
    assert (made.report("a", "1").texts, made.report("a", "2").texts) == (150, 120)
    # Metrics are those of the current revision.
    assert [levels["length"] for _, _, levels in recorded.calls] == [0]
    made.follow("a", "2", {"2": spec})
    assert [levels for _, _, levels in recorded.calls[1:]] == [
        {},
        {"label": 0, "confidence": 0, "length": 2, "unknown": 0},
    ]
    assert made.report("a", "1").note == NOT_COUNTED
    made.follow("a", "3", {"3": spec})
    assert recorded.calls[-1] == ("a", 0, {})
    assert made.report("a", "3").texts == 0
    made.follow("a", None, {})
    answer(made, 10, revision="3")
    assert made.report("a", "3").texts == 0
    # It comes back under the same revision.
    made.follow("a", "1", {"1": spec})
    assert made.report("a", "1").texts == 0


def test_bins_have_names_for_people(recorded: Recorded, spec: AdapterSpec) -> None:
    made = monitor(recorded)
    made.follow("a", "1", {"1": spec})
    answer(made, 200, length=50)
    names = {
        quantity.quantity: [each.bin for each in quantity.bins]
        for quantity in made.report("a", "1").quantities
    }
    assert names == {
        "label": ["ham", "spam"],
        "confidence": ["all"],
        "length": ["under 6", "6 and more"],
        "unknown": ["all"],
    }


def test_of_a_large_request_no_more_texts_are_asked_for_than_are_kept(
    recorded: Recorded, spec: AdapterSpec
) -> None:
    made = monitor(recorded, keeps=5)
    made.follow("a", "1", {"1": spec})
    assert len(answer(made, 200)) == 5
    assert answer(made, 200, revision="0") == ()
    assert monitor(recorded).answered([], []) == ()
