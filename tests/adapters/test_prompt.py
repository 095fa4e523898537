"""The prompt generator: its size, its folded form, its gradients, and independence of rows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec, FinalActivation, GeneratorPooling
from adapters.packed.layout import Layout
from adapters.packed.packing import PackedBatch, Row, RowShape
from adapters.packed.prompt import (
    GeneratorWeights,
    generate,
    padded_token_weights,
    padded_weighted_sums,
    project,
    token_weights,
    weighted_sums,
)
from tests.support.families import FAMILY_NAMES, backbone_of
from tests.support.reference import naive_prompt
from tests.support.tiny_models import attention_of, make_adapter, make_spec

TEXTS = ("good", "my card is not free", "a bad call now", "", "the " * 30)


def generator_parameters(spec: AdapterSpec) -> int:
    shapes = spec.shapes()
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith("generator.") and name != "generator.down.bias"
    )


def batch_of(backbone: Backbone, *adapters: Adapter) -> PackedBatch:
    """Every text for every adapter."""
    rows = [
        Row(
            backbone.encoder.encode(text, max_length=backbone.max_tokens),
            RowShape.of(adapter.spec),
            index,
        )
        for text in TEXTS
        for index, adapter in enumerate(adapters)
    ]
    return backbone.pack(rows)


@pytest.mark.parametrize(("n", "published"), [(768, 2_064_384), (1024, 3_538_944)])
def test_the_generator_has_the_published_number_of_parameters(
    backbone: Backbone, n: int, published: int
) -> None:
    """t = 10, c = 34: 3n^2 + 384n. The paper counts neither W_down's bias nor the head."""
    spec = make_spec(backbone, prompt_length=10, bottleneck=34, attention_size=n)
    spec = spec.model_copy(update={"hidden_size": n})
    assert generator_parameters(spec) == 3 * n * n + 384 * n == published


@pytest.mark.parametrize("activation", list(FinalActivation))
@pytest.mark.parametrize("pooling", list(GeneratorPooling))
@pytest.mark.parametrize("attention_size", [4, 32, 50])
def test_folded_weights_make_the_prompt_of_the_equation(
    backbone: Backbone, activation: FinalActivation, pooling: GeneratorPooling, attention_size: int
) -> None:
    adapter = make_adapter(
        backbone,
        attention_size=attention_size,
        generator_pooling=pooling,
        final_activation=activation,
        generator_input="embeddings",
    )
    batch = batch_of(backbone, adapter)
    (insertion,) = batch.insertions
    (generation,) = insertion.generations
    source = torch.randn(batch.layout.tokens, 32, generator=_seeded())
    unfolded = GeneratorWeights.of(attention_of(adapter), dict(adapter.tensors))
    outputs = {
        weights: generate(source, generation, {0: weights})
        for weights in (unfolded, unfolded.folded())
    }
    for place, (start, length) in enumerate(
        zip(batch.layout.starts, batch.layout.lengths, strict=True)
    ):
        tokens = source[start : start + length].double().numpy()
        expected, w = naive_prompt(tokens, adapter.spec, dict(adapter.tensors))
        for prompts, weights in outputs.values():
            assert weights is not None
            t = adapter.spec.prompt_length
            prompt = prompts[place * t : (place + 1) * t].numpy()
            # Two products of float32 sums over 32 values of size ~10.
            np.testing.assert_allclose(prompt, expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(weights[start : start + length], w, rtol=0, atol=1e-5)


def test_a_prompt_through_relu_is_never_negative(backbone: Backbone) -> None:
    adapter = make_adapter(backbone, final_activation="relu")
    batch = batch_of(backbone, adapter)
    generation = batch.insertions[0].generations[0]
    source = torch.randn(batch.layout.tokens, 32, generator=_seeded())
    weights = GeneratorWeights.of(attention_of(adapter), dict(adapter.tensors))
    prompts, _ = generate(source, generation, {0: weights})
    assert bool((prompts >= 0).all())
    assert 0 < int((prompts == 0).sum()) < prompts.numel()


def test_a_texts_token_weights_do_not_depend_on_its_neighbours() -> None:
    """There is no padding, so no neighbour can leak into a text's softmax or mean."""
    random = torch.Generator().manual_seed(0)
    states = torch.randn(9, 8, generator=random)
    strange = torch.full((5, 8), 1e4)
    alone = Layout(np.array([9]))
    beside = Layout(np.array([5, 9]))
    both = torch.cat([strange, states])
    w = token_weights(states, states, alone)
    assert torch.allclose(token_weights(both, both, beside)[5:], w, rtol=0, atol=1e-6)
    sums = weighted_sums(both, token_weights(both, both, beside), beside)
    assert torch.allclose(sums[1], weighted_sums(states, w, alone)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("room", [0, 12])
def test_padded_rows_give_the_same_prompts_and_gradients_as_runs_of_equal_length(room: int) -> None:
    """What a GPU computes, also with more padding than the longest text needs."""
    lengths = np.array([2, 4, 4, 9])
    start = torch.randn(3, 19, 8, generator=_seeded())
    upstream = torch.randn(4, 8, generator=_seeded())
    results = []
    for layout, weigh, add in (
        (Layout(lengths), token_weights, weighted_sums),
        (Layout(lengths, room=room), padded_token_weights, padded_weighted_sums),
    ):
        queries, keys, tokens = (part.clone().requires_grad_() for part in start)
        weights = weigh(queries, keys, layout)
        sums = add(tokens, weights, layout)
        sums.backward(upstream)
        results.append((weights, sums, queries.grad, keys.grad, tokens.grad))
    for expected, padded in zip(*results, strict=True):
        assert expected is not None
        torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-5)


def test_mean_pooling_gives_every_token_the_same_weight(backbone: Backbone) -> None:
    adapter = make_adapter(backbone, generator_pooling="mean")
    weights = GeneratorWeights.of(attention_of(adapter), dict(adapter.tensors))
    queries, keys = project(torch.randn(6, 32), weights)
    layout = Layout(np.array([2, 4]))
    expected = torch.tensor([1 / 2] * 2 + [1 / 4] * 4)
    assert torch.equal(token_weights(queries, keys, layout), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_reach_every_generator_tensor_and_no_frozen_one(family: str) -> None:
    backbone = backbone_of(family)
    adapters = [
        make_adapter(backbone, seed=1, insertion_layer=1, generator_input="embeddings"),
        make_adapter(backbone, seed=2, insertion_layer=2, generator_input="hidden"),
        make_adapter(backbone, seed=3, insertion_layer=2, pooling="mean", final_activation="tanh"),
    ]
    trained: list[dict[str, Tensor]] = [
        {name: tensor.clone().requires_grad_() for name, tensor in adapter.tensors.items()}
        for adapter in adapters
    ]
    generators = {
        index: GeneratorWeights.of(attention_of(adapter), trained[index])
        for index, adapter in enumerate(adapters)
    }
    answers = backbone.forward(batch_of(backbone, *adapters), generators)
    answers.states.square().sum().backward()
    for tensors in trained:
        for name, tensor in tensors.items():
            if name.startswith("generator."):
                assert tensor.grad is not None, name
                assert bool(tensor.grad.isfinite().all()), name
                assert float(tensor.grad.abs().sum()) > 0, name
    for weight in backbone.family.layers(backbone._model).parameters():
        assert weight.grad is None


def test_gradients_are_those_of_finite_differences() -> None:
    """A tensor that reaches the answer outside the graph would fail here."""
    backbone = backbone_of("bert")
    adapter = make_adapter(
        backbone, insertion_layer=2, prompt_length=2, bottleneck=3, final_activation="tanh"
    )
    batch = batch_of(backbone, adapter)
    tensors = dict(adapter.tensors)
    direction = torch.randn(
        len(TEXTS), backbone.hidden_size, generator=_seeded(), dtype=torch.float64
    )

    def objective(value: Tensor) -> Tensor:
        weights = GeneratorWeights.of(attention_of(adapter), tensors | {"generator.value": value})
        return (backbone.forward(batch, {0: weights}).states.double() * direction).sum()

    value = tensors["generator.value"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(value), value)
    along = torch.randn(value.shape, generator=_seeded())
    step = 1e-3
    with torch.no_grad():
        slope = (objective(value + step * along) - objective(value - step * along)) / (2 * step)
    # float32 states of size 1 moved by some 1e-3 keep three digits of their difference.
    assert float((gradient * along).sum()) == pytest.approx(float(slope), rel=0.02)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)
