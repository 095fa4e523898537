"""Texts of low confidence are bounded in number, bytes and time, and go when they must."""

from dataclasses import replace

import numpy as np
import pytest

from adapters.backbone.model import Backbone
from service.drift.interface import UncertainText
from service.drift.uncertain import UncertainTexts, certainty_of
from tests.support.tiny_models import make_spec

TEXT = UncertainText(
    adapter="a",
    revision="1",
    text="call me",
    text_pair=None,
    label="ham",
    certainty=0.5,
    scores=(("ham", 0.5),),
    time="2026-11-27T12:00:00.000+00:00",
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def kept(clock: Clock, *, texts: int = 3, max_bytes: int = 2**20) -> UncertainTexts:
    return UncertainTexts(texts=texts, max_bytes=max_bytes, seconds=60.0, clock=clock)


def text(number: int, certainty: float, adapter: str = "a", revision: str = "1") -> UncertainText:
    return replace(
        TEXT, text=f"text {number}", certainty=certainty, adapter=adapter, revision=revision
    )


def test_the_least_certain_are_kept_in_order(clock: Clock) -> None:
    texts = kept(clock)
    for number, certainty in enumerate((0.9, 0.5, 0.7, 0.6, 0.95)):
        if texts.wants("a", certainty):
            texts.add(text(number, certainty))
    assert [item.certainty for item in texts.texts("a")] == [0.5, 0.6, 0.7]
    assert not texts.wants("a", 0.7)
    assert texts.wants("a", 0.69)
    assert texts.wants("b", 1.0)


def test_one_text_is_kept_once(clock: Clock) -> None:
    texts = kept(clock)
    for certainty in (0.5, 0.4):
        texts.add(replace(TEXT, certainty=certainty))
    texts.add(replace(TEXT, text_pair="another"))
    assert len(texts) == 2


def test_what_is_too_old_goes_even_if_nothing_comes(clock: Clock) -> None:
    texts = kept(clock)
    texts.add(text(1, 0.5))
    clock.now = 30.0
    texts.add(text(2, 0.6))
    clock.now = 60.5
    texts.expire()
    assert [item.text for item in texts.texts("a")] == ["text 2"]
    clock.now = 91.0
    texts.expire()
    assert len(texts) == 0
    # The same text may be kept again.
    texts.add(text(1, 0.5))
    assert len(texts) == 1


def test_all_adapters_together_stay_within_the_bytes(clock: Clock) -> None:
    texts = kept(clock, texts=100, max_bytes=10_000)
    for number in range(200):
        texts.add(text(number, 0.5, adapter=f"adapter-{number % 7}"))
        assert texts._bytes <= 10_000
    assert 5 < len(texts) < 20
    # What was kept first goes first.
    assert "text 199" in {item.text for item in texts.texts(f"adapter-{199 % 7}")}
    huge = replace(TEXT, text="x" * 4000, text_pair="y" * 4000)
    texts.add(huge)
    assert huge not in texts.texts("a")


def test_a_name_is_forgotten_but_for_the_revisions_that_stay(clock: Clock) -> None:
    texts = kept(clock)
    texts.add(text(1, 0.5))
    texts.add(text(2, 0.6, revision="2"))
    texts.add(text(3, 0.6, adapter="b"))
    assert texts.forget("a", but=("2",)) == 1
    assert [item.revision for item in texts.texts("a")] == ["2"]
    assert texts.forget("a") == 1
    assert texts.forget("a") == 0
    assert len(texts) == 1
    texts.forget("b")
    assert texts._bytes == 0
    assert not texts._known


def test_certainty_is_the_score_of_a_label_or_the_distance_to_the_nearest_threshold(
    backbone: Backbone,
) -> None:
    one = make_spec(backbone, labels=("x", "y", "z"))
    assert certainty_of(one, np.array([0.2, 0.7, 0.1], np.float32)) == pytest.approx(0.7)
    sets = make_spec(backbone, activation="sigmoid", thresholds=(0.5, 0.2))
    assert certainty_of(sets, np.array([0.9, 0.25], np.float32)) == pytest.approx(0.05)
