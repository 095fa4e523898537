"""The central claim: in a packed, mixed batch every text gets the same answer as alone.

Everything is compared with tests/support/reference.py. Observed in float32: at most 2.6e-6 from the
plain model, and 3.1e-6 between a batch and its rows alone, where only the order of sums changes.
"""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.families import (
    FAMILY_NAMES,
    LAYERS,
    POSITIONS,
    backbone_from,
    config_of,
    model_from,
    model_of,
    tokenizer_of,
)
from tests.support.mixtures import (
    WORDS,
    Case,
    Text,
    adapters_of,
    cases,
    classify_packed,
    mixtures,
)
from tests.support.reference import answer_alone
from tests.support.tiny_models import make_adapter, make_spec

BOUND = 1e-5  # on probabilities, float32
# bfloat16 keeps 8 bits: one different rounding changes a value by 0.4 %. Observed: equal answers on
# these models, a difference of 4e-6 on the default backbone.
BFLOAT16_BOUND = 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_rows_of_a_mixed_batch_equal_each_text_alone_through_the_plain_model(family: str) -> None:
    plain, tokenizer = model_of(family), tokenizer_of(family)
    backbone = backbone_from(plain, tokenizer)

    @settings(max_examples=10, derandomize=True, deadline=None, database=None)
    @given(case=cases())
    def compare(case: Case) -> None:
        adapters = adapters_of(backbone, case)
        for item, answer in zip(
            case.texts, classify_packed(backbone, adapters, case.texts), strict=True
        ):
            adapter = adapters[item.adapter]
            scores, weights = answer_alone(
                plain, tokenizer, adapter.spec, dict(adapter.tensors), item.text, item.pair
            )
            np.testing.assert_allclose(answer.scores, scores, rtol=0, atol=BOUND)
            np.testing.assert_allclose(answer.token_weights, weights, rtol=0, atol=BOUND)
            assert answer.token_weights.sum() == pytest.approx(1, abs=BOUND)

    compare()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_batch_gives_the_answers_of_its_rows_alone_in_any_order(family: str) -> None:
    backbone = backbone_from(model_of(family), tokenizer_of(family))

    @settings(max_examples=10, derandomize=True, deadline=None, database=None)
    @given(case=cases(), shuffle=st.randoms(use_true_random=False))
    def compare(case: Case, shuffle: random.Random) -> None:
        adapters = adapters_of(backbone, case)
        together = classify_packed(backbone, adapters, case.texts)
        order = list(range(len(case.texts)))
        shuffle.shuffle(order)
        shuffled = classify_packed(backbone, adapters, tuple(case.texts[i] for i in order))
        for place, index in enumerate(order):
            (alone,) = classify_packed(backbone, adapters, (case.texts[index],))
            for other in (alone, shuffled[place]):
                assert np.abs(together[index].scores - other.scores).max() <= BOUND
                assert np.abs(together[index].token_weights - other.token_weights).max() <= BOUND

    compare()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_adapters_of_all_kinds_answer_in_one_batch_as_alone_through_the_plain_model(
    family: str,
) -> None:
    plain, tokenizer = model_of(family), tokenizer_of(family)
    backbone = backbone_from(plain, tokenizer)

    @settings(max_examples=5, derandomize=True, deadline=None, database=None)
    @given(case=mixtures(backbone))
    def compare(case: Case) -> None:
        adapters = adapters_of(backbone, case)
        together = classify_packed(backbone, adapters, case.texts)
        for item, answer in zip(case.texts, together, strict=True):
            adapter = adapters[item.adapter]
            scores, weights = answer_alone(
                plain, tokenizer, adapter.spec, dict(adapter.tensors), item.text, item.pair
            )
            np.testing.assert_allclose(answer.scores, scores, rtol=0, atol=BOUND)
            np.testing.assert_allclose(answer.token_weights, weights, rtol=0, atol=BOUND)

    compare()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_text_of_any_length_gets_the_same_answer_as_alone(family: str) -> None:
    plain, tokenizer = model_of(family, seed=3), tokenizer_of(family)
    backbone = backbone_from(plain, tokenizer)
    adapter = make_adapter(backbone, insertion_layer=2, prompt_length=4)
    texts = tuple(Text(0, "! " * count, None) for count in range(POSITIONS + 2))
    answers = classify_packed(backbone, [adapter], texts)
    lengths = {len(answer.token_weights) for answer in answers}
    assert max(lengths) == POSITIONS == backbone.max_tokens
    for item, answer in zip(texts, answers, strict=True):
        scores, _ = answer_alone(
            plain, tokenizer, adapter.spec, dict(adapter.tensors), item.text, None
        )
        np.testing.assert_allclose(answer.scores, scores, rtol=0, atol=BOUND)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_a_text_that_spells_the_padding_token_keeps_its_positions(family: str) -> None:
    plain, tokenizer = model_of(family), tokenizer_of(family)
    backbone = backbone_from(plain, tokenizer)
    adapter = make_adapter(backbone)
    texts = tuple(
        Text(0, text, None) for text in ("good <pad> card", "<pad><pad> bad", "the good card")
    )
    assert tokenizer.pad_token_id in tokenizer("good <pad> card")["input_ids"]
    for item, answer in zip(texts, classify_packed(backbone, [adapter], texts), strict=True):
        scores, _ = answer_alone(
            plain, tokenizer, adapter.spec, dict(adapter.tensors), item.text, None
        )
        np.testing.assert_allclose(answer.scores, scores, rtol=0, atol=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    "change",
    [
        {"insertion_layer": 2},
        {"prompt_length": 3},
        {"attention_size": 8},
        {"generator_input": "hidden"},
        {"generator_pooling": "mean"},
        {"final_activation": "none"},
        {"pooling": "mean"},
        {"calibration": {"temperature": 2.0}},
        {"activation": "sigmoid"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_comparison_notices_another_method(family: str, change: dict[str, Any]) -> None:
    """If the reference reads one field differently, the answer changes far beyond the bound."""
    plain, tokenizer = model_of(family), tokenizer_of(family)
    backbone = backbone_from(plain, tokenizer)
    adapter = make_adapter(backbone, insertion_layer=1, prompt_length=6, attention_size=24)
    text = "good card, bad plot"
    tensors = dict(adapter.tensors)
    same = {"insertion_layer": 1, "prompt_length": 6, "attention_size": 24}
    other = make_spec(backbone, **same | change)
    if "prompt_length" in change:
        tensors["generator.up.weight"] = tensors["generator.up.weight"][
            :, : 3 * backbone.hidden_size
        ]
        tensors["generator.up.bias"] = tensors["generator.up.bias"][: 3 * backbone.hidden_size]
    right, _ = answer_alone(plain, tokenizer, adapter.spec, dict(adapter.tensors), text, None)
    wrong, _ = answer_alone(plain, tokenizer, other, tensors, text, None)
    assert np.abs(right - wrong).max() > 10 * BOUND


def test_backbones_made_from_one_config_object_leave_each_other_alone() -> None:
    config = config_of("bert")
    plain = model_from(config)
    before = plain(input_ids=torch.tensor([[2, 7, 8, 3]])).last_hidden_state
    first = backbone_from(plain, tokenizer_of("bert"))
    second = backbone_from(plain, tokenizer_of("bert"))
    texts = (Text(0, "a good card", None), Text(0, "bad", "free"))
    adapter = make_adapter(first)
    expected = classify_packed(first, [adapter], texts)
    second.to(dtype=torch.bfloat16)
    assert plain.config._attn_implementation == "eager"
    after = plain(input_ids=torch.tensor([[2, 7, 8, 3]])).last_hidden_state
    assert torch.equal(before, after)
    for one, two in zip(expected, classify_packed(first, [adapter], texts), strict=True):
        assert np.array_equal(one.scores, two.scores)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bfloat16_rows_get_their_answers_of_alone_within_its_bound(family: str) -> None:
    backbone = backbone_from(model_of(family), tokenizer_of(family)).to(dtype=torch.bfloat16)
    adapters = [
        make_adapter(
            backbone,
            seed=layer,
            labels=("a", "b", "c"),
            insertion_layer=layer,
            prompt_length=1 + 3 * layer,
            generator_input="hidden" if layer % 2 else "embeddings",
        )
        for layer in range(LAYERS)
    ]
    chosen = random.Random(0)
    texts = tuple(
        Text(chosen.randrange(LAYERS), " ".join(chosen.choices(WORDS, k=length)), None)
        for length in range(30)
    )
    for item, mixed in zip(texts, classify_packed(backbone, adapters, texts), strict=True):
        (alone,) = classify_packed(backbone, adapters, (item,))
        assert np.abs(mixed.scores - alone.scores).max() <= BFLOAT16_BOUND
        second, first = np.sort(alone.scores)[-2:]
        if first - second > 2 * BFLOAT16_BOUND:
            assert mixed.scores.argmax() == alone.scores.argmax()
