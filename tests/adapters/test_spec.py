"""The spec: every wrong field is named, and its fields decide which tensors there are."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from adapters.backbone.model import Backbone
from adapters.errors import InvalidAdapter, with_escapes
from adapters.format.files import Adapter
from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    FinalActivation,
    FirstTokenPrompt,
    GeneratorInput,
    GeneratorPooling,
    Head,
    HeadKind,
    Pooling,
    Prompt,
    RoutedPrompt,
    StaticPrompt,
    VectorTuning,
)
from tests.support.hostile_files import fault_of, faults_of, with_spec, with_spec_text
from tests.support.tiny_models import make_adapter, make_spec


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"format_version": 3}, "format_version: expected the integer 1 or 2"),
        ({"format_version": "1"}, "format_version"),
        ({"format_version": True}, "format_version: expected the integer 1 or 2"),
        ({"format_version": 2.0}, "format_version: expected the integer 1 or 2"),
        ({"method": "idspam"}, "method"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"prompt.length": 0}, "prompt.attention.length"),
        ({"prompt.length": True}, "prompt.attention.length"),
        ({"prompt.bottleneck": -1}, "prompt.attention.bottleneck"),
        ({"prompt.layer": -1}, "prompt.attention.layer"),
        ({"prompt.kind": "magic"}, "prompt: Input tag 'magic'"),
        ({"prompt.layer": None}, "prompt.attention.layer"),
        ({"head.pooling": "max"}, "head.pooling"),
        ({"head": "mlp"}, "head"),
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
        ({"decision": {"abstain_below": 1.5}}, "decision.abstain_below"),
        ({"decision": {"abstain_below": "0.5"}}, "decision.abstain_below"),
        ({"decision": {"abstain_below": True}}, "decision.abstain_below"),
        ({"decision": {"precision": 0.9}}, "a precision without abstain_below"),
        ({"decision": {"abstain_below": 0.5, "precision": 1.0}}, "decision.precision"),
        ({"decision": {"abstain_over": 0.5}}, "decision.abstain_over"),
        ({"decision": {"coverage": [[0.5, 1.0]]}}, "decision.coverage.0"),
        ({"decision": {"coverage": [[0.5, 1.0, 1.1]]}}, "decision.coverage.0.2"),
        ({"decision": {"coverage": [[0.5, 1.0, 0.9]] * 2}}, "coverage: thresholds must rise"),
        (
            {"decision": {"coverage": [[0.5, 0.9, 0.9], [0.6, 1.0, 0.9]]}},
            "coverage: thresholds must rise, and the shares answered fall",
        ),
        (
            {"decision": {"coverage": [[i / 100, 1 - i / 100, 0.5] for i in range(65)]}},
            "decision.coverage",
        ),
        (
            {"activation": "sigmoid", "decision": {"abstain_below": 0.5}},
            "decision is for softmax, activation is sigmoid",
        ),
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
    wrong = {"hidden_size": "32", "prompt.length": 0, "head.pooling": "max", "x": 1}
    faults = faults_of(with_spec(adapter, **wrong))
    assert [fault.split(": ")[1] for fault in faults] == [
        "hidden_size",
        "prompt.attention.length",
        "head.pooling",
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
    for activation in ("softmax", "sigmoid"):
        text = make_spec(backbone, activation=activation).to_json()
        assert "thresholds" not in text
        assert AdapterSpec.from_json(text).thresholds is None


def test_thresholds_are_read_as_they_were_written(backbone: Backbone) -> None:
    spec = make_spec(backbone, activation="sigmoid", thresholds=(0.1, 1 / 3))
    assert AdapterSpec.from_json(spec.to_json()).thresholds == (0.1, 1 / 3)
    assert spec.label_thresholds == (0.1, 1 / 3)


def test_a_decision_is_read_as_it_was_written(backbone: Backbone) -> None:
    plain = make_spec(backbone)
    assert "decision" not in plain.to_json()
    assert plain.abstain_below is None
    points = ((0.5, 1.0, 0.9), (0.8, 0.75, 1.0))
    decision = {"abstain_below": 0.0, "precision": 0.9, "coverage": points}
    spec = make_spec(backbone, decision=decision)
    assert AdapterSpec.from_json(spec.to_json()) == spec
    assert (spec.abstain_below, spec.decision and spec.decision.coverage) == (0.0, points)
    without = make_spec(backbone, decision={"coverage": points})
    assert AdapterSpec.from_json(without.to_json()).abstain_below is None


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


VERSION_1 = {
    "format_version": 1,
    "method": "idspam",
    "backbone": {"name": "b", "revision": None, "fingerprint": "0" * 64},
    "tokenizer_sha256": "1" * 64,
    "hidden_size": 32,
    "prompt_length": 3,
    "bottleneck": 8,
    "attention_size": 16,
    "insertion_layer": 1,
    "generator_input": "hidden",
    "generator_pooling": "mean",
    "final_activation": "tanh",
    "pooling": "mean",
    "head": "mlp",
    "activation": "softmax",
    "labels": ["ham", "spam"],
    "max_length": 64,
    "calibration": {"temperature": 1.5},
    "provenance": {"data": "d", "metrics": {}},
}


def test_a_spec_of_version_1_means_the_same_in_version_2() -> None:
    spec = AdapterSpec.from_json(json.dumps(VERSION_1))
    assert spec.prompt == AttentionPrompt(
        length=3, layer=1, source=GeneratorInput.HIDDEN, pooling=GeneratorPooling.MEAN,
        bottleneck=8, attention_size=16, final_activation=FinalActivation.TANH,
    )  # fmt: skip
    assert spec.head == Head(kind=HeadKind.MLP, pooling=Pooling.MEAN)
    assert (spec.tuning, spec.format_version, spec.method) == (None, 2, "idspam")
    assert spec.calibration.temperature == 1.5
    assert AdapterSpec.from_json(spec.to_json()) == spec
    del VERSION_1["format_version"]
    assert AdapterSpec.from_json(json.dumps(VERSION_1)) == spec


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": "lora"}, "method"),
        ({"prompt_length": 0}, "prompt_length"),
        ({"bottleneck": "8"}, "bottleneck"),
        ({"insertion_layer": 1.5}, "insertion_layer"),
        ({"pooling": "first"}, "pooling"),
        ({"prompt": {"kind": "static", "length": 1}}, "prompt"),
        ({"labels": ["ham", "ham"]}, "labels must be distinct"),
        ({"activation": "sigmoid", "thresholds": [0.5]}, "1 thresholds for 2 labels"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_a_wrong_field_of_a_spec_of_version_1_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        AdapterSpec.from_json(json.dumps(VERSION_1 | fields))
    assert any(named in fault for fault in caught.value.faults)


STATIC = {"kind": "static", "length": 2}
TUNING = {"kind": "vectors", "layers": [0, 2], "intermediate_size": 64}
LORA = TUNING | {"kind": "lora", "rank": 4, "scaling": 2.0, "sites": ["query", "value"]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tuning": TUNING | {"layers": [2, 2]}}, "layers 2 to 1 are none"),
        ({"tuning": TUNING | {"layers": [0]}}, "tuning.vectors.layers"),
        ({"tuning": TUNING | {"layers": [-1, 2]}}, "tuning.vectors.layers.0"),
        ({"tuning": TUNING | {"kind": "dora"}}, "tuning: Input tag 'dora'"),
        ({"tuning": TUNING | {"rank": 4}}, "tuning.vectors.rank"),
        ({"tuning": LORA | {"rank": 65}}, "tuning.lora.rank"),
        ({"tuning": LORA | {"rank": 0}}, "tuning.lora.rank"),
        ({"tuning": LORA | {"scaling": 0}}, "tuning.lora.scaling"),
        ({"tuning": LORA | {"sites": []}}, "tuning.lora.sites"),
        ({"tuning": LORA | {"sites": ["value", "query"]}}, "in the order of a layer"),
        ({"tuning": LORA | {"sites": ["query", "query"]}}, "distinct"),
        ({"tuning": LORA | {"sites": ["activated"]}}, "activated is not a linear map"),
        ({"tuning": LORA | {"sites": ["everything"]}}, "tuning.lora.sites.0"),
        (
            {"prompt": {"kind": "static", "length": 2, "layer": 1, "shifts_text": True}},
            "at layer 0",
        ),
        ({"prompt": {"kind": "routed", "length": 2, "prompts": 1}}, "prompt.routed.prompts"),
        (
            {"prompt": {"kind": "first-token", "length": 2, "layer": 1}},
            "prompt.first-token.bottleneck",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_a_wrong_field_of_a_part_is_named(
    adapter: Adapter, fields: dict[str, Any], named: str
) -> None:
    assert any(named in fault for fault in faults_of(with_spec(adapter, **fields)))


@pytest.mark.parametrize(
    ("prompt", "tuning", "name"),
    [
        (None, None, "head"),
        (None, VectorTuning(layers=(0, 1), intermediate_size=64), "vectors"),
        (StaticPrompt(length=2), None, "prompt-tuning"),
        (RoutedPrompt(length=2, prompts=4), None, "smop"),
        (FirstTokenPrompt(length=2, layer=1, bottleneck=4), None, "lpt"),
    ],
    ids=["head", "vectors", "static", "routed", "first-token"],
)
def test_a_spec_says_what_was_trained(
    backbone: Backbone, prompt: Prompt | None, tuning: VectorTuning | None, name: str
) -> None:
    assert make_spec(backbone, prompt=prompt, tuning=tuning).method == name
    assert make_spec(backbone, tuning=tuning).method == "+".join(
        ["idspam"] + (["vectors"] if tuning else [])
    )
