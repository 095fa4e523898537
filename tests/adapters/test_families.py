"""Models that can run packed batches, models that are refused, and what stays frozen."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from adapters.backbone.families import FAMILIES, family_of
from adapters.backbone.model import Backbone, check_fits
from adapters.errors import IncompatibleAdapter, UnsupportedBackbone
from adapters.format.spec import EmbeddingTable, StaticPrompt, VectorTuning
from adapters.packed.packing import Row, RowShape
from tests.support.families import (
    FAMILY_NAMES,
    HIDDEN,
    LAYERS,
    POSITIONS,
    backbone_from,
    backbone_of,
    config_of,
    model_of,
    tokenizer_of,
)
from tests.support.tiny_models import make_adapter, make_spec


def test_every_supported_family_is_tested() -> None:
    assert set(FAMILIES) == set(FAMILY_NAMES)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_backbone_knows_its_size(family: str) -> None:
    backbone = backbone_of(family)
    assert (backbone.layers, backbone.hidden_size) == (LAYERS, HIDDEN)
    assert backbone.max_tokens == POSITIONS


@pytest.mark.parametrize("family", ["mpnet", "deberta", "deberta-v2", "t5", "llama", "albert"])
def test_a_family_that_cannot_run_packed_batches_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=f"'{family}'.*supported: bert, distilbert"):
        family_of(AutoConfig.for_model(family))


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "relative_key"},
        {"position_embedding_type": "relative_key_query"},
        {"is_decoder": True},
        {"add_cross_attention": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra"])
def test_an_encoder_configured_as_something_else_is_refused(
    family: str, fields: dict[str, Any]
) -> None:
    config = config_of(family)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedBackbone, match=f"this {family} "):
        family_of(config)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_weights_are_frozen_and_run_without_dropout(family: str) -> None:
    model = model_of(family).train()
    backbone = backbone_from(model, tokenizer_of(family))
    adapter = make_adapter(backbone)
    assert not any(weight.requires_grad for weight in backbone.state_dict().values())
    batch = backbone.pack(
        [Row(backbone.encoder.encode("a good card", max_length=16), RowShape.of(adapter.spec), 0)]
    )
    first = backbone.trunk(batch, LAYERS).hidden
    assert torch.equal(first, backbone.trunk(batch, LAYERS).hidden)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_trunk_is_the_plain_models_hidden_states(family: str) -> None:
    plain = model_of(family)
    backbone = backbone_from(plain, tokenizer_of(family))
    encoding = backbone.encoder.encode("a good card", max_length=16)
    batch = backbone.pack([Row(encoding, RowShape.of(make_spec(backbone)), 0)])
    with torch.no_grad():
        expected = plain(input_ids=batch.input_ids[None], output_hidden_states=True).hidden_states
    kept = None
    for layer in range(LAYERS):
        kept = backbone.trunk(batch, layer, start=kept)
        assert torch.allclose(kept.hidden, expected[layer][0], rtol=0, atol=1e-5)


def test_a_spec_of_another_backbone_is_refused_with_every_difference(backbone: Backbone) -> None:
    spec = make_spec(backbone)
    check_fits(spec, backbone)
    other = spec.model_copy(
        update={
            "backbone": spec.backbone.model_copy(update={"name": "else", "fingerprint": "0" * 64}),
            "tokenizer_sha256": "1" * 64,
            "hidden_size": backbone.hidden_size + 1,
            "prompt": StaticPrompt(length=1, layer=backbone.layers),
            "max_length": backbone.max_tokens + 1,
        }
    )
    with pytest.raises(IncompatibleAdapter) as caught:
        check_fits(other, backbone)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "backbone",
        "tokenizer",
        "hidden_size",
        "prompt.layer",
        "max_length",
    ]
    assert "'else'" in caught.value.faults[0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tokenizer_sha256": "1" * 64}, "tokenizer: 111111111111"),
        ({"hidden_size": 31}, "hidden_size: 31, the backbone's is 32"),
        (
            {"prompt": StaticPrompt(length=1, layer=3)},
            "prompt.layer: 3, the backbone has layers 0..2",
        ),
        (
            {"tuning": VectorTuning(layers=(1, 4), intermediate_size=64)},
            "tuning.layers: up to 3, the backbone has layers 0..2",
        ),
        (
            {"tuning": VectorTuning(layers=(0, 3), intermediate_size=65)},
            "tuning.intermediate_size: 65, the backbone's is 64",
        ),
        ({"max_length": 129}, "max_length: 129, the backbone takes 128 tokens"),
        (
            {"prompt": StaticPrompt(length=3, shifts_text=True), "max_length": 126},
            "max_length: 126 after a prompt of 3, the backbone takes 128 tokens",
        ),
        (
            {"prompt": StaticPrompt(length=3, table=EmbeddingTable(positions=4, rank=2, width=31))},
            "prompt.table.width: 31, the word embeddings of the backbone have 32",
        ),
    ],
    ids=[
        "tokenizer",
        "hidden size",
        "prompt",
        "tuned layers",
        "width",
        "length",
        "shifted length",
        "table",
    ],
)
def test_one_difference_is_enough(backbone: Backbone, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(IncompatibleAdapter) as caught:
        check_fits(make_spec(backbone).model_copy(update=fields), backbone)
    (fault,) = caught.value.faults
    assert fault.startswith(named)
