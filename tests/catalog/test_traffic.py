"""The division of a name's texts as a value: which texts it takes, and how it is stored."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.catalog.traffic import Ending, InvalidTraffic, Rule, Traffic, key_of_text

FIRST, SECOND, THIRD = "a" * 64, "b" * 64, "c" * 64
KEYS = [f"user-{number}".encode() for number in range(20_000)]


def taken(percent: float, keys: Sequence[bytes] = KEYS, *, revision: str = SECOND) -> set[bytes]:
    traffic = Traffic(revision, FIRST, percent)
    return {key for key in keys if traffic.takes("spam", key)}


@given(percent=st.floats(0, 100))
@settings(max_examples=25, deadline=None)
def test_the_share_of_many_keys_is_the_percentage(percent: float) -> None:
    share = percent / 100
    # Five standard deviations.
    most = 5 * (share * (1 - share) / len(KEYS)) ** 0.5 + 1e-9
    assert abs(len(taken(percent)) / len(KEYS) - share) <= most


@given(percents=st.tuples(st.floats(0, 100), st.floats(0, 100)))
@settings(max_examples=25, deadline=None)
def test_a_key_that_is_taken_stays_taken_when_the_percentage_grows(
    percents: tuple[float, float],
) -> None:
    less, more = sorted(percents)
    assert taken(less, KEYS[:2000]) <= taken(more, KEYS[:2000])


@given(key=st.binary(max_size=100))
def test_the_ends_of_the_percentage_take_nothing_and_everything(key: bytes) -> None:
    assert not taken(0, [key])
    assert taken(100, [key])


def test_another_revision_and_another_name_try_other_texts() -> None:
    ten = taken(10)
    other = taken(10, revision=THIRD)
    named = {key for key in KEYS if Traffic(SECOND, FIRST, 10).takes("topic", key)}
    for independent in (other, named):
        # A tenth of a tenth, and not the same tenth.
        assert len(ten & independent) == pytest.approx(len(KEYS) / 100, rel=0.3)


def test_a_text_and_its_pair_are_one_key() -> None:
    keys = [
        key_of_text("a", None),
        key_of_text("a", ""),
        key_of_text("a", "b"),
        key_of_text("ab", None),
    ]
    assert len(set(keys)) == len(keys)


@given(
    traffic=st.builds(
        Traffic,
        revision=st.just(SECOND),
        baseline=st.just(FIRST),
        percent=st.floats(0, 100),
        shadow=st.booleans(),
        rule=st.builds(Rule, st.none() | st.floats(0, 1), st.none() | st.floats(0, 1)),
        staged=st.booleans(),
        since=st.text(max_size=20),
        ended=st.none() | st.builds(Ending, st.just("errors"), st.text(), st.text()),
    )
)
def test_what_is_stored_is_read_again(traffic: Traffic) -> None:
    assert Traffic.from_json(traffic.to_json()) == traffic


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"revision": 1, "baseline": "a", "percent": 5}',
        f'{{"revision": "{SECOND}", "baseline": "{FIRST}", "percent": 101}}',
        '{"revision": "b", "baseline": "a", "percent": 5, "rule": {"min_texts": 0}}',
        f'{{"revision": "{SECOND}", "baseline": "{FIRST}", "percent": 5',
    ],
)
def test_what_is_not_a_division_is_refused(text: str) -> None:
    with pytest.raises(InvalidTraffic):
        Traffic.from_json(text)


def test_the_first_ending_stays() -> None:
    ended = Traffic(SECOND, FIRST, 5).end("errors", "too many")
    assert not ended.in_force
    assert ended.end("stopped", "by hand") is ended
