"""The spec: every wrong field is named, and its fields decide which tensors there are."""

from typing import Any

import pytest
from pydantic import ValidationError

from adapters.backbone.model import Backbone
from adapters.errors import with_escapes
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec
from tests.support.hostile_files import fault_of, faults_of, with_spec, with_spec_text
from tests.support.tiny_models import make_adapter, make_spec


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"format_version": 2}, "format_version"),
        ({"format_version": "1"}, "format_version"),
        ({"format_version": True}, "format_version: Value error, expected the integer 1"),
        ({"format_version": 1.0}, "format_version: Value error, expected the integer 1"),
        ({"method": "lora"}, "method"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"prompt_length": 0}, "prompt_length"),
        ({"prompt_length": True}, "prompt_length"),
        ({"bottleneck": -1}, "bottleneck"),
        ({"insertion_layer": -1}, "insertion_layer"),
        ({"pooling": "max"}, "pooling"),
        ({"labels": []}, "labels"),
        ({"labels": "ham"}, "labels"),
        ({"labels": ["ham", "ham"]}, "labels must be distinct"),
        ({"labels": ["ham", ""]}, "labels.1"),
        ({"labels": ["ham", 1]}, "labels.1"),
        ({"labels": ["ham"]}, "at least two labels"),
        ({"calibration": {"temperature": 0.0}}, "calibration.temperature"),
        ({"calibration": {"temperature": -1.0}}, "calibration.temperature"),
        ({"calibration": {"temperature": 1.0, "bias": 0}}, "calibration.bias"),
        ({"provenance": {"author": "x"}}, "provenance.author"),
        ({"tokenizer_sha256": "abc"}, "tokenizer_sha256"),
        ({"backbone": None}, "backbone"),
        ({"backbone": {"name": "x"}}, "backbone.fingerprint"),
        ({"colour": "red"}, "colour"),
        ({"thresholds": [0.5, 0.5]}, "thresholds are for sigmoid, activation is softmax"),
        ({"activation": "sigmoid", "thresholds": [0.5]}, "1 thresholds for 2 labels"),
        ({"activation": "sigmoid", "thresholds": []}, "0 thresholds for 2 labels"),
        ({"activation": "sigmoid", "thresholds": [0.5] * 3}, "3 thresholds for 2 labels"),
        ({"activation": "sigmoid", "thresholds": [0.5, 0.0]}, "thresholds.1"),
        ({"activation": "sigmoid", "thresholds": [1.0, 0.5]}, "thresholds.0"),
        ({"activation": "sigmoid", "thresholds": [1, 0.5]}, "thresholds.0"),
        ({"activation": "sigmoid", "thresholds": [-0.5, 0.5]}, "thresholds.0"),
        ({"activation": "sigmoid", "thresholds": ["0.5", 0.5]}, "thresholds.0"),
        ({"activation": "sigmoid", "thresholds": [True, 0.5]}, "thresholds.0"),
        ({"activation": "sigmoid", "thresholds": 0.5}, "thresholds"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_a_wrong_field_of_the_spec_is_named(
    adapter: Adapter, fields: dict[str, Any], named: str
) -> None:
    assert any(named in fault for fault in faults_of(with_spec(adapter, **fields)))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_number_that_is_not_finite_is_refused(adapter: Adapter, value: str) -> None:
    def change(text: str) -> str:
        assert '"temperature":1.0' in text
        return text.replace('"temperature":1.0', f'"temperature":{value}')

    assert "spec: calibration.temperature" in fault_of(with_spec_text(adapter, change))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "\x00", '{"a":' * 50_000, "9" * 5000], ids=range(7)
)
def test_a_spec_that_is_not_an_object_is_refused(adapter: Adapter, text: str) -> None:
    assert all(
        fault.startswith("spec") for fault in faults_of(with_spec_text(adapter, lambda _: text))
    )


def test_a_field_that_is_given_twice_is_refused(adapter: Adapter) -> None:
    twice = with_spec_text(adapter, lambda text: text[:-1] + ',"hidden_size":16}')
    assert "repeated keys: hidden_size" in fault_of(twice)


def test_several_wrong_fields_are_all_named(adapter: Adapter) -> None:
    faults = faults_of(with_spec(adapter, hidden_size="32", prompt_length=0, pooling="max", x=1))
    assert [fault.split(": ")[1] for fault in faults] == [
        "hidden_size",
        "prompt_length",
        "pooling",
        "x",
    ]


def test_a_spec_is_read_as_it_was_written(backbone: Backbone) -> None:
    spec = make_spec(backbone, labels=("ham 🙂", 'sp"am'), calibration={"temperature": 3})
    assert AdapterSpec.from_json(spec.to_json()) == spec


def test_a_spec_cannot_be_changed(backbone: Backbone) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_spec(backbone).hidden_size = 3  # type: ignore[misc]  # refused by mypy as well


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", "null"])
def test_a_threshold_that_is_not_finite_is_refused(backbone: Backbone, value: str) -> None:
    adapter = make_adapter(backbone, activation="sigmoid", thresholds=(0.25, 0.75))

    def change(text: str) -> str:
        assert '"thresholds":[0.25,0.75]' in text
        return text.replace("0.75", value)

    assert "spec: thresholds.1" in fault_of(with_spec_text(adapter, change))


def test_a_file_without_thresholds_has_no_such_field(backbone: Backbone) -> None:
    # So that services that do not have the field take every file that they could serve.
    for activation in ("softmax", "sigmoid"):
        text = make_spec(backbone, activation=activation).to_json()
        assert "thresholds" not in text
        assert AdapterSpec.from_json(text).thresholds is None


def test_thresholds_are_read_as_they_were_written(backbone: Backbone) -> None:
    spec = make_spec(backbone, activation="sigmoid", thresholds=(0.1, 1 / 3))
    assert AdapterSpec.from_json(spec.to_json()).thresholds == (0.1, 1 / 3)
    assert spec.label_thresholds == (0.1, 1 / 3)


def test_without_thresholds_every_label_needs_a_half(backbone: Backbone) -> None:
    assert make_spec(backbone, activation="sigmoid").label_thresholds == (0.5, 0.5)


def test_a_sigmoid_may_have_one_label(backbone: Backbone) -> None:
    assert make_spec(backbone, labels=("toxic",), activation="sigmoid").labels == ("toxic",)


@pytest.mark.parametrize(
    ("fields", "without", "added"),
    [
        ({}, set(), set()),
        ({"generator_pooling": "mean"}, {"generator.query", "generator.key"}, set()),
        ({"head": "mlp"}, set(), {"head.dense.weight", "head.dense.bias"}),
    ],
    ids=["default", "mean pooling", "mlp head"],
)
def test_the_spec_decides_which_tensors_there_are(
    backbone: Backbone, fields: dict[str, Any], without: set[str], added: set[str]
) -> None:
    usual = {
        "generator.query": (32, 16),
        "generator.key": (32, 16),
        "generator.value": (32, 32),
        "generator.down.weight": (32, 8),
        "generator.down.bias": (8,),
        "generator.up.weight": (8, 96),
        "generator.up.bias": (96,),
        "head.out.weight": (32, 2),
        "head.out.bias": (2,),
    }
    shapes = make_spec(backbone, attention_size=16, **fields).shapes()
    assert shapes.keys() == (usual.keys() - without) | added
    assert all(shapes[name] == usual[name] for name in usual.keys() - without)


UNSAFE = {
    "sp\0am": r"sp\x00am", "sp\nam": r"sp\nam", "\x1b[31mspam": r"\x1b[31mspam",
    "spam\t": r"spam\t",
    "spam\x7f": r"spam\x7f", "spam\x85": r"spam\x85", "\u202eevil": r"\u202eevil",
    "\u2066x": r"\u2066x", "a\u2028b": r"a\u2028b",
}  # fmt: skip


@pytest.mark.parametrize(("label", "shown"), UNSAFE.items(), ids=range(len(UNSAFE)))
def test_a_label_that_cannot_be_shown_safely_is_named_with_escapes(
    adapter: Adapter, label: str, shown: str
) -> None:
    fault = fault_of(with_spec(adapter, labels=["ham", label]))
    assert fault.startswith(f"spec: labels.1: Value error, the label '{shown}' has the control")
    assert fault.isprintable()


@pytest.mark.parametrize(("text", "shown"), UNSAFE.items(), ids=range(len(UNSAFE)))
@pytest.mark.parametrize(
    "field", ["backbone.name", "backbone.revision", "provenance.data", "provenance.data_licence",
              "provenance.command", "provenance.code_version", "provenance.created"]
)  # fmt: skip
def test_what_people_read_of_a_spec_is_as_safe_as_its_labels(
    adapter: Adapter, field: str, text: str, shown: str
) -> None:
    part, _, name = field.partition(".")
    changed = getattr(adapter.spec, part).model_dump() | {name: text}
    fault = fault_of(with_spec(adapter, **{part: changed}))
    assert fault.startswith(f"spec: {field}: Value error, '{shown}' has the control character U+")
    assert fault.isprintable()


def test_names_of_metrics_are_as_safe_as_labels(adapter: Adapter) -> None:
    provenance = adapter.spec.provenance.model_dump() | {"metrics": {"acc\u202e": 1.0}}
    fault = fault_of(with_spec(adapter, provenance=provenance))
    assert "has the control character U+202E" in fault
    assert fault.isprintable()


def test_a_command_with_a_tab_is_kept_as_an_escape() -> None:
    assert with_escapes("fit --label-separator '\t' caf\u00e9") == (
        "fit --label-separator '\\t' caf\u00e9"
    )


def test_labels_of_any_script_are_accepted(backbone: Backbone) -> None:
    # With a joiner, a direction mark and a no-break space, which these scripts need.
    marked = (
        "\u0645\u06cc\u200c\u0645",
        "\u05e9\u05dc\u200f!",
        "a\u200db",
        "très\u00a0bien",
        "日本",
    )
    for label in marked:
        assert make_spec(backbone, labels=("ham", label)).labels[1] == label
