"""What a data set must be to be trained on, and honest held-out rows."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.dataset import (
    Dataset,
    Example,
    check_labels,
    check_same_task,
    check_trainable,
    split_validation,
)
from train.errors import DataError


def _dataset(examples: Sequence[Example], source: str = "F") -> Dataset:
    return Dataset(source, "0" * 64, tuple(examples))


def test_one_single_label_cannot_be_trained_on() -> None:
    with pytest.raises(DataError, match="all 2 rows have the label 'x'; at least two are needed"):
        check_trainable(_dataset([Example("a", None, "x"), Example("b", None, "x")]))


def test_more_labels_than_an_adapter_can_have_are_refused() -> None:
    with pytest.raises(DataError, match="5,000 different labels, at most 4096"):
        check_trainable(_dataset([Example(str(i), None, str(i)) for i in range(5000)]))


def test_labels_that_training_lacks_are_named() -> None:
    train = _dataset([Example("a", None, "x"), Example("b", None, "y")], "train.csv")
    test = _dataset([Example("a", None, "z"), Example("b", None, "w")], "test.csv")
    with pytest.raises(
        DataError, match=r"test\.csv: labels that train\.csv does not have: 'w', 'z'"
    ):
        check_same_task(train, test)
    check_labels(test, ("w", "x", "z"), known_to="the adapter")


def test_pairs_are_not_validated_with_single_texts() -> None:
    train = _dataset([Example("a", "b", "x"), Example("b", "c", "y")], "train.csv")
    other = _dataset([Example("a", None, "x")], "other.csv")
    with pytest.raises(DataError, match=r"other\.csv: holds single texts, train\.csv holds pairs"):
        check_same_task(train, other)


examples_strategy = st.lists(
    st.builds(
        Example,
        text=st.integers(0, 60).map(str),
        text_pair=st.none(),
        label=st.sampled_from("abcd"),
    ),
    min_size=2,
    max_size=120,
)


@settings(max_examples=60, deadline=None)
@given(examples=examples_strategy, fraction=st.floats(0.01, 0.9), seed=st.integers(0, 5))
def test_a_split_loses_nothing_leaks_nothing_and_keeps_every_label_in_training(
    examples: list[Example], fraction: float, seed: int
) -> None:
    dataset = _dataset(examples)
    try:
        train, validation = split_validation(dataset, fraction=fraction, seed=seed)
    except DataError:
        unambiguous = {e.text: {f.label for f in examples if f.text == e.text} for e in examples}
        single = Counter(next(iter(v)) for v in unambiguous.values() if len(v) == 1)
        assert max(single.values(), default=0) <= 1
        return
    assert Counter(train.examples) + Counter(validation.examples) == Counter(examples)
    assert not {e.text for e in train.examples} & {e.text for e in validation.examples}
    assert train.labels == dataset.labels
    assert split_validation(dataset, fraction=fraction, seed=seed) == (train, validation)


def test_a_split_holds_out_the_same_share_of_every_label() -> None:
    counts = {"common": 700, "middle": 250, "rare": 50}
    examples = [Example(f"{y} {i}", None, y) for y, n in counts.items() for i in range(n)]
    _, validation = split_validation(_dataset(examples), fraction=0.1, seed=1)
    held_out = Counter(example.label for example in validation.examples)
    assert held_out == {"common": 70, "middle": 25, "rare": 5}


def test_many_rare_labels_together_still_give_their_share() -> None:
    examples = [Example(f"{y} {i}", None, str(y)) for y in range(100) for i in range(4)]
    _, validation = split_validation(_dataset(examples), fraction=0.1, seed=1)
    assert len(validation) == 40
    assert max(Counter(example.label for example in validation.examples).values()) == 1


def test_other_seeds_hold_out_other_rows() -> None:
    examples = [Example(str(i), None, str(i % 2)) for i in range(100)]
    splits = {
        split_validation(_dataset(examples), fraction=0.2, seed=s)[1].examples for s in (1, 2)
    }
    assert len(splits) == 2


def test_too_few_rows_to_split_say_what_to_do() -> None:
    with pytest.raises(DataError, match="give --validation or --validation-fraction 0"):
        split_validation(
            _dataset([Example("a", None, "x"), Example("b", None, "y")]), fraction=0.5, seed=0
        )
