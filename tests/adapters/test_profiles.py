"""The profile of an adapter: how texts are counted, and which ones a hostile file may claim."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, serialize, validate
from adapters.format.profile import MOST_EDGES, Profile
from adapters.format.spec import AdapterSpec
from adapters.profiles import CONFIDENCE_EDGES, Bins, counts_of, length_edges, profile_of
from tests.support.hostile_files import faults_of, with_spec
from tests.support.tiny_models import make_adapter, make_spec

UNKNOWN = 1
PROFILE: dict[str, Any] = {
    "version": 1,
    "source": "validation",
    "rows": 10,
    "labels": [7, 3],
    "unlabelled": 0,
    "confidence": {"edges": [0.5, 0.9], "counts": [1, 2, 7]},
    "length": {"edges": [4.0], "counts": [5, 5]},
    "unknown": {"edges": [], "counts": [10]},
}


def ids(*tokens: int) -> Any:
    return np.array(tokens, dtype=np.int64)


def scores(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


def bins_of(spec: AdapterSpec) -> Bins:
    return Bins(
        spec, confidence=(0.5, 0.9), length=(4.0,), unknown=(0.0001, 0.5), unknown_id=UNKNOWN
    )


def changed(path: str, value: Any) -> dict[str, Any]:
    """`PROFILE` with one field changed, or removed if the value is `...`."""
    profile = copy.deepcopy(PROFILE)
    *parts, last = path.split(".")
    place = profile
    for part in parts:
        place = place[part]
    place[last] = value
    if value is ...:
        del place[last]
    return profile


def test_a_text_is_counted_once_for_each_quantity(backbone: Backbone) -> None:
    bins = bins_of(make_spec(backbone))
    # ham, spam, none | three of confidence | two of length | three of unknown.
    assert bins.starts == (0, 3, 6, 8, 11)
    assert bins.of_text(scores(0.2, 0.8), ids(5, 6, 7)) == [1, 4, 6, 8]
    # An edge belongs to the bin above it.
    assert bins.of_text(scores(0.5, 0.4), ids(5, 6, 7, 8)) == [0, 4, 7, 8]
    assert bins.of_text(scores(0.4, 0.3), ids(1, 6, 7)) == [0, 3, 6, 9]
    assert bins.of_text(scores(0.95, 0.05), ids(1, 1, 7)) == [0, 5, 6, 10]


def test_an_adapter_that_abstains_gives_no_label_below_its_threshold(backbone: Backbone) -> None:
    bins = bins_of(make_spec(backbone, decision={"abstain_below": 0.7}))
    assert bins.of_text(scores(0.69, 0.31), ids(5))[0] == 2
    assert bins.of_text(scores(0.71, 0.29), ids(5))[0] == 0


def test_a_set_of_labels_is_counted_by_each_of_them(backbone: Backbone) -> None:
    spec = make_spec(
        backbone, labels=("x", "y", "z"), activation="sigmoid", thresholds=(0.5, 0.2, 0.9)
    )
    bins = bins_of(spec)
    assert bins.of_text(scores(0.6, 0.3, 0.8), ids(5))[:-3] == [0, 1]
    assert bins.of_text(scores(0.1, 0.1, 0.1), ids(5))[:-3] == [3]
    assert spec.label_set([0.6, 0.3, 0.8]) == ["x", "y"]


def test_a_tokenizer_that_reads_every_byte_knows_every_token(backbone: Backbone) -> None:
    spec = make_spec(backbone)
    bins = Bins(spec, confidence=(), length=(), unknown=(0.0001,), unknown_id=None)
    assert bins.of_text(scores(1.0, 0.0), ids(1, 1, 1)) == [0, 3, 4, 5]


def test_a_profile_counts_every_text_and_its_file_keeps_it(backbone: Backbone) -> None:
    spec = make_spec(backbone)
    random = np.random.default_rng(0)
    texts = []
    for _ in range(200):
        spam = float(random.random())
        texts.append((scores(1 - spam, spam), random.integers(1, 30, random.integers(2, 40))))
    profile = profile_of(spec, texts, unknown_id=UNKNOWN, source="test")
    assert (profile.rows, profile.source, profile.unlabelled) == (200, "test", 0)
    for counts in counts_of(profile).values():
        assert sum(counts) == 200
    assert profile.labels[1] == sum(each[1] > each[0] for each, _ in texts)
    assert profile.confidence.edges == CONFIDENCE_EDGES
    # Nearly tenths of the texts.
    assert max(profile.length.counts) < 40
    adapter = make_adapter(backbone, profile=profile)
    assert validate(serialize(adapter)).spec.profile == profile


def test_what_is_shorter_or_longer_than_all_texts_has_bins_of_its_own(backbone: Backbone) -> None:
    assert length_edges([7] * 50) == (7.0, 8.0)
    assert length_edges([1, 8192]) == (8192.0,)
    profile = profile_of(
        make_spec(backbone), [(scores(1.0, 0.0), ids(5, 6))], unknown_id=None, source="given"
    )
    assert profile.length.counts == (0, 1, 0)


def test_a_profile_of_a_thousand_labels_is_small(backbone: Backbone) -> None:
    labels = tuple(f"label {number}" for number in range(1000))
    spec = make_spec(backbone, labels=labels)
    random = np.random.default_rng(1)
    texts = [
        (random.random(1000).astype(np.float32), ids(*range(2, 2 + length)))
        for length in random.integers(2, 100, 2000)
    ]
    profile = profile_of(spec, texts, unknown_id=UNKNOWN, source="validation")
    assert len(profile.model_dump_json()) < 4096


def test_a_file_without_a_profile_is_as_it_was(adapter: Adapter) -> None:
    assert adapter.spec.profile is None
    assert "profile" not in json.loads(adapter.spec.to_json())


def test_a_profile_may_be_given_by_hand(adapter: Adapter) -> None:
    read = validate(with_spec(adapter, profile=PROFILE)).spec.profile
    assert read == Profile.model_validate_json(json.dumps(PROFILE), strict=True)


@pytest.mark.parametrize(
    ("profile", "named"),
    [
        (3, "profile"),
        (changed("version", 2), "profile.version"),
        (changed("version", True), "profile.version"),
        (changed("version", 1.0), "profile.version"),
        (changed("source", "somewhere"), "profile.source"),
        (changed("rows", 0), "profile.rows"),
        (changed("rows", "10"), "profile.rows"),
        (changed("rows", 10.0), "profile.rows"),
        (changed("rows", 11), "confidence counts 10 texts, there are 11 rows"),
        (changed("rows", ...), "profile.rows"),
        (changed("labels", [7, 3, 0]), "profile counts 3 labels, there are 2"),
        (changed("labels", [7, 2]), "profile counts 9 labels of 10 texts"),
        (changed("labels", [7, 4]), "profile counts 11 labels of 10 texts"),
        (changed("labels", [11, 0]), "more texts for a label than the 10 rows"),
        (changed("labels", [10**30, 3]), "profile.labels.0"),
        (changed("labels", [-7, 17]), "profile.labels.0"),
        (changed("labels", []), "profile.labels"),
        (changed("labels", [1] * 5000), "profile.labels"),
        (changed("unlabelled", 11), "more texts for a label"),
        (changed("unlabelled", True), "profile.unlabelled"),
        (changed("confidence.counts", [1, 2]), "2 counts for 2 edges"),
        (changed("confidence.counts", [1, 2, 8]), "confidence counts 11 texts"),
        (changed("confidence.edges", [0.9, 0.5]), "edges must rise"),
        (changed("confidence.edges", [0.5, 0.5]), "edges must rise"),
        (changed("confidence.edges", [0.0, 0.5]), "edges must be above 0 and at most 1"),
        (changed("confidence.edges", [0.5, 1.5]), "edges must be above 0 and at most 1"),
        (changed("confidence.edges", ["0.5", 0.9]), "profile.confidence.edges.0"),
        (changed("length.edges", [1.0]), "edges must be above 1 and at most 8192"),
        (changed("length.edges", [1e300]), "edges must be above 1"),
        (changed("length", ...), "profile.length"),
        (
            changed("unknown.edges", [(index + 1) / 100 for index in range(MOST_EDGES + 1)]),
            "profile.unknown.edges",
        ),
        (changed("unknown.counts", []), "profile.unknown.counts"),
        (changed("unknown.colour", "red"), "profile.unknown.colour"),
        (changed("colour", "red"), "profile.colour"),
    ],
)
def test_a_wrong_profile_is_named(adapter: Adapter, profile: Any, named: str) -> None:
    assert any(named in fault for fault in faults_of(with_spec(adapter, profile=profile)))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400"])
def test_an_edge_that_is_not_finite_is_refused(value: str) -> None:
    text = json.dumps({**PROFILE, "length": {"edges": [9999.5], "counts": [5, 5]}})
    with pytest.raises(ValueError, match=r"length\.edges"):
        Profile.model_validate_json(text.replace("9999.5", value), strict=True)


def test_more_labels_than_texts_are_fine_for_sets_of_labels(adapter: Adapter) -> None:
    sets = changed("labels", [9, 8])
    spec = {"activation": "sigmoid", "profile": sets}
    assert validate(with_spec(adapter, **spec)).spec.profile is not None
    few = changed("labels", [2, 3])
    faults = faults_of(with_spec(adapter, activation="sigmoid", profile=few))
    assert any("profile counts 5 labels of 10 texts" in fault for fault in faults)
