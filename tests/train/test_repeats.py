"""Repeated rows: exact and near ones, leaks and conflicts, what is left without them, and speed."""

import random
import time
from itertools import combinations

import numpy as np
import pytest

from train.data.dataset import Dataset, Example, Label
from train.data.near_duplicates import SIMILAR, near_duplicates, normalised
from train.data.repeats import Repeat, dropped_rows, find_repeats, without_leaks
from train.errors import DataError

LONG = "the parcel that was promised for monday has still not arrived at my office in town"


def _set(*rows: tuple[str, Label] | tuple[str, str, Label], name: str = "rows") -> Dataset:
    examples = tuple(
        Example(row[0], row[1] if len(row) == 3 else None, row[-1], line)
        for line, row in enumerate(rows, start=1)
    )
    return Dataset(name, "0" * 64, examples)


@pytest.mark.parametrize(
    "copy",
    [
        LONG.upper() + "!!",
        f"  {LONG.replace(' ', '  ')}.",
        LONG.replace("promised", "promissed"),
        LONG.replace("monday", "friday"),
        LONG.replace("still ", ""),
        LONG + " today",
    ],
)
def test_a_copy_with_small_changes_is_near_and_a_leak(copy: str) -> None:
    train = _set(("something else that is said about cards", "b"), (LONG, "a"))
    repeats = find_repeats({"train": train, "test": _set((copy, "a"), ("other", "b"))})
    (leak,) = repeats.leaks
    assert (leak.split, leak.row, leak.other_split, leak.other_row) == ("train", 1, "test", 0)
    assert not leak.exact
    assert leak.similarity >= SIMILAR
    (leaked,) = repeats.leaked
    assert (leaked.split, leaked.row, leaked.other_row) == ("test", 0, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("how do I freeze my card", "how do I unfreeze my card"),
        ("it was good", "it was bad"),
        ("great 🙂", "great 🙁"),
        ("costs 5 €", "costs 5 $"),
        ("我的卡丢了怎么办", "我的卡坏了怎么办"),
        (LONG, LONG.replace("parcel", "refund").replace("monday", "april").replace("town", "york")),
    ],
)
def test_texts_that_say_something_else_are_not_near(one: str, other: str) -> None:
    repeats = find_repeats({"train": _set((one, "a"), ("x", "b")), "test": _set((other, "a"))})
    assert repeats.leaks == ()


def test_equal_texts_are_exact_whatever_their_labels() -> None:
    train = _set(("x", "a"), ("y", "b"), ("x", "b"))
    repeats = find_repeats(
        {"train": train, "validation": _set(("x", "b")), "test": _set(("x", "a"))}
    )
    assert [(leak.split, leak.row, leak.other_split) for leak in repeats.leaks] == [
        ("train", 0, "test"),
        ("train", 2, "test"),
        ("train", 0, "validation"),
        ("train", 2, "validation"),
        ("validation", 0, "test"),
    ]
    assert all(leak.exact for leak in repeats.leaks)


def test_of_a_pair_both_texts_have_to_be_near() -> None:
    question = "where has the parcel of last week been left by the driver"
    train = _set((question, LONG, "yes"), ("who", "a card", "no"))
    apart = _set(("what is the colour of the office and of its door", LONG, "yes"))
    assert find_repeats({"train": train, "test": apart}).leaks == ()
    near = _set((question + "?", LONG.upper(), "yes"))
    (leak,) = find_repeats({"train": train, "test": near}).leaks
    assert leak.similarity == 1.0
    swapped = _set((LONG, question, "yes"))
    assert find_repeats({"train": train, "test": swapped}).leaks == ()


def test_many_questions_about_one_passage_are_no_leaks() -> None:
    passage = LONG * 5
    rows = [
        (f"question {index * 7919} about {index % 7} things", passage, "a") for index in range(400)
    ]
    rows += [("something else", "of another kind", "b")]
    began = time.perf_counter()
    repeats = find_repeats({"train": _set(*rows[::2]), "test": _set(*rows[1::2])})
    assert time.perf_counter() - began < 5
    assert not any(leak.exact for leak in repeats.leaks)


def test_rows_of_one_text_with_different_labels_are_conflicts() -> None:
    train = _set(
        (LONG, "a"),
        (LONG, "b"),
        (LONG.upper(), "a"),
        ("alone", "a"),
        ("twice", "b"),
        ("twice", "b"),
    )
    conflicts = find_repeats({"train": train}).conflicts
    assert [(found.row, found.other_row, found.exact) for found in conflicts] == [
        (0, 1, True),
        (1, 0, True),
        (2, 1, False),
    ]
    sets = _set((LONG, ("a", "b")), (LONG, ("a",)), ("x", ()), ("x", ()), ("y", ("b",)))
    assert [found.row for found in find_repeats({"train": sets}).conflicts] == [0, 1]


def test_blank_rows_are_no_repeats_and_texts_of_punctuation_are() -> None:
    repeats = find_repeats(
        {"train": _set((" ", "a"), ("", "b"), (":)", "a")), "test": _set(("", "a"), (":)", "a"))}
    )
    assert [(leak.row, leak.other_row) for leak in repeats.leaks] == [(2, 1)]
    assert repeats.conflicts == ()
    assert normalised(" A,  b!c ") == "a b c"
    assert normalised("?!") == "?!"


def test_without_leaks_the_reported_rows_are_as_before_and_none_of_them_is_in_train() -> None:
    sets = {
        "train": _set((LONG, "a"), ("x", "a"), ("x", "b"), ("y", "a"), ("z", "b"), ("w", "a")),
        "validation": _set(("y", "a"), ("v", "b"), ("u", "b")),
        "test": _set((LONG + "!", "a"), ("v", "b")),
    }
    repeats = find_repeats(sets)
    kept = without_leaks(sets, repeats)
    assert [row.text for row in kept["train"].examples] == ["z", "w"]
    assert [row.text for row in kept["validation"].examples] == ["y", "u"]
    assert kept["test"] == sets["test"]
    assert dropped_rows(repeats) == {"train": {0, 1, 2, 3}, "validation": {1}}
    again = find_repeats(kept)
    assert (again.leaks, again.conflicts) == ((), ())


def test_a_split_that_would_be_empty_is_refused() -> None:
    sets = {"train": _set(("x", "a"), ("y", "b")), "test": _set(("y", "b"), ("X", "a"))}
    with pytest.raises(DataError, match="leaves no train rows: all 2 repeat other rows"):
        without_leaks(sets, find_repeats(sets))


def _words(draw: random.Random, count: int) -> list[str]:
    return ["".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(count)]


@pytest.mark.slow
def test_no_near_pair_is_missed() -> None:
    """Against all pairs, for texts of 3 to 60 words and copies with some changes."""
    draw = random.Random(5)
    texts: set[str] = set()
    for _ in range(150):
        words = _words(draw, draw.randint(3, 60))
        texts.add(" ".join(words))
        for _ in range(draw.randint(0, 3)):
            changed = list(words)
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(len(words))] = _words(draw, 1)[0]
            texts.add(" ".join(changed))
    rows = [(text, None) for text in sorted(texts)]
    pieces = [{f"{text}\0\0\0\0"[i : i + 4] for i in range(len(text))} for text, _ in rows]
    expected = {
        (one, other)
        for one, other in combinations(range(len(rows)), 2)
        if len(pieces[one] & pieces[other]) >= SIMILAR * len(pieces[one] | pieces[other])
    }
    assert len(expected) > 50
    found = near_duplicates(rows, lambda first, _: np.ones(len(first), dtype=bool))
    assert {(pair.first, pair.second) for pair in found} == expected


@pytest.mark.slow
def test_tens_of_thousands_of_rows_take_seconds() -> None:
    draw = random.Random(1)
    vocabulary = _words(draw, 3000)
    rows = [(" ".join(draw.choices(vocabulary, k=14)), draw.choice("ab")) for _ in range(30_000)]
    copies = [(text + " now", label) for text, label in rows[:500]]
    sets = {"train": _set(*rows), "test": _set(*copies)}
    began = time.perf_counter()
    repeats = find_repeats(sets)
    # 1.5 s on one idle core.
    assert time.perf_counter() - began < 15
    assert {leak.row for leak in repeats.leaks} >= set(range(495))


@pytest.mark.slow
def test_thousands_of_messages_from_one_template_take_seconds() -> None:
    rows = [(f"{LONG}, and your code for it is {index:06}", "a") for index in range(0, 8000, 2)]
    copies = [(f"{LONG}, and your code for it is {index:06}", "a") for index in range(1, 2000, 2)]
    began = time.perf_counter()
    repeats = find_repeats({"train": _set(*rows), "test": _set(*copies)})
    assert time.perf_counter() - began < 20
    assert len(repeats.leaked) == len(copies)
    assert isinstance(repeats.leaks[0], Repeat)
