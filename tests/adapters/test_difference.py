"""What differs between two adapters: labels, kind, sizes, every field, thresholds and figures."""

import subprocess
import sys
from typing import Any

import pytest

from adapters.backbone.model import Backbone
from adapters.difference import Difference, LabelChanges, ValueChange, difference, label_changes
from adapters.format.spec import (
    AdapterSpec,
    BackboneIdentity,
    Calibration,
    Decision,
    LoraTuning,
    Provenance,
    Site,
    StaticPrompt,
)
from tests.support.kinds import adapters_of_all_kinds
from tests.support.tiny_models import make_spec


def by_field(found: Difference) -> dict[str, tuple[Any, Any]]:
    return {change.field: (change.before, change.after) for change in found.fields}


def test_the_same_spec_differs_in_nothing(backbone: Backbone) -> None:
    found = difference(make_spec(backbone), make_spec(backbone), size_before=7, size_after=7)
    assert not found
    assert found == Difference()
    assert found.lines() == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("a", "b"), ("a", "b"), LabelChanges()),
        (("a", "b"), ("b", "a"), LabelChanges(reordered=True)),
        (("a", "b"), ("a", "b", "c"), LabelChanges(added=("c",))),
        (("a", "b", "c"), ("a", "c"), LabelChanges(removed=("b",))),
        (("a", "b"), ("b", "c", "a"), LabelChanges(added=("c",), reordered=True)),
        (("a", "b"), ("c", "d"), LabelChanges(added=("c", "d"), removed=("a", "b"))),
    ],
)
def test_labels_are_added_removed_or_in_another_order(
    backbone: Backbone, before: tuple[str, ...], after: tuple[str, ...], expected: LabelChanges
) -> None:
    old, new = make_spec(backbone, labels=before), make_spec(backbone, labels=after)
    assert label_changes(old, new) == expected
    assert difference(old, new) == Difference(labels=expected)
    assert bool(difference(old, new)) == (before != after)


def test_another_kind_names_every_field_that_only_one_side_has(backbone: Backbone) -> None:
    before = make_spec(backbone)
    lora = LoraTuning(
        layers=(0, 2), intermediate_size=64, rank=4, scaling=2.0, sites=(Site.QUERY, Site.VALUE)
    )
    after = make_spec(backbone).model_copy(update={"prompt": None, "tuning": lora})
    found = by_field(difference(before, after, size_before=100, size_after=90))
    assert found["kind"] == ("idspam", "lora")
    assert found["size"] == (100, 90)
    assert found["prompt.length"] == (3, None)
    assert found["tuning.rank"] == (None, 4)
    assert found["tuning.layers"] == (None, [0, 2])
    assert found["tuning.sites"] == (None, ["query", "value"])
    assert list(found)[:2] == ["kind", "size"]
    assert "prompt" not in found
    assert "tuning" not in found


def test_every_pair_of_kinds_differs_at_least_in_its_kind_or_a_field(backbone: Backbone) -> None:
    specs = [adapter.spec for adapter in adapters_of_all_kinds(backbone).values()]
    for before in specs:
        for after in specs:
            assert bool(difference(before, after)) == (before != after)


def test_thresholds_are_those_in_force_of_labels_that_both_have(backbone: Backbone) -> None:
    fields: dict[str, Any] = {"activation": "sigmoid"}
    before = make_spec(backbone, labels=("a", "b"), **fields)
    after = make_spec(backbone, labels=("b", "c"), thresholds=(0.7, 0.2), **fields)
    found = difference(before, after)
    assert found.thresholds == (ValueChange("b", 0.5, 0.7),)
    assert "threshold of b: 0.5 -> 0.7" in found.lines()
    one_label = make_spec(backbone, labels=("b", "c"))
    assert difference(before, one_label).thresholds == ()
    assert by_field(difference(before, one_label))["activation"] == ("sigmoid", "softmax")


def test_temperature_backbone_and_where_it_comes_from_are_fields(backbone: Backbone) -> None:
    before = make_spec(backbone)
    other = BackboneIdentity(name="another", fingerprint="0" * 64)
    after = make_spec(backbone, calibration=Calibration(temperature=1.5), max_length=64).model_copy(
        update={"backbone": other, "provenance": Provenance(data="new.csv")}
    )
    found = by_field(difference(before, after))
    assert found["calibration.temperature"] == (1.0, 1.5)
    assert found["backbone.name"] == (backbone.identity.name, "another")
    assert found["backbone.fingerprint"][1] == "0" * 64
    assert found["max_length"] == (128, 64)
    assert found["provenance.data"] == (None, "new.csv")


def test_training_figures_are_compared_by_name(backbone: Backbone) -> None:
    def trained(**metrics: float) -> AdapterSpec:
        return make_spec(backbone, provenance=Provenance(metrics=metrics))

    found = difference(trained(accuracy=0.9, loss=0.3), trained(accuracy=0.95, f1=0.8))
    assert found.figures == (
        ValueChange("accuracy", 0.9, 0.95),
        ValueChange("loss", 0.3, None),
        ValueChange("f1", None, 0.8),
    )
    assert found.lines() == ["accuracy: 0.9 -> 0.95", "loss: 0.3 -> none", "f1: none -> 0.8"]


def test_a_table_of_numbers_is_named_and_not_listed(backbone: Backbone) -> None:
    coverage = ((0.1, 1.0, 0.9), (0.5, 0.8, 0.95))
    before = make_spec(backbone, decision=Decision(abstain_below=0.2))
    after = make_spec(backbone, decision=Decision(abstain_below=0.3, coverage=coverage))
    found = difference(before, after)
    assert by_field(found) == {"decision.abstain_below": (0.2, 0.3)}
    assert found.tables == ("decision.coverage",)
    assert "decision.coverage differs" in found.lines()


def test_a_sentence_stays_short_whatever_a_file_says(backbone: Backbone) -> None:
    before = make_spec(backbone, prompt_length=3)
    after = make_spec(
        backbone,
        labels=tuple(f"label {index}" for index in range(500)),
        provenance=Provenance(command="fit " * 1000),
    ).model_copy(update={"prompt": StaticPrompt(length=4)})
    assert max(map(len, difference(before, after).lines())) < 200


def test_comparing_loads_no_torch() -> None:
    command = "import sys, adapters.difference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
