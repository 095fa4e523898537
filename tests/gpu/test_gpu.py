"""On a CUDA device every family gives the answers of the CPU.

float32 bound: sums are in another order, 1e-5 as on the CPU. bfloat16 bound: eight bits over four
wide random layers; two batches with the same text differ because the kernels tile them differently.
"""

import copy

import numpy as np
import pytest
import torch

from adapters.adapter import Classification, classify, prepare, rows_of
from adapters.backbone.loading import computes_bfloat16
from adapters.backbone.model import Backbone
from tests.support.families import FAMILY_NAMES, LAYERS, backbone_from, model_of, tokenizer_of
from tests.support.tiny_models import make_adapter

pytestmark = pytest.mark.gpu

FLOAT32_BOUND = 1e-5
BFLOAT16_BOUND = 0.05
TEXTS = ["", "good", "the card is not free " * 3, "bad call", "you win now " * 8, "hello " * 60] * 4


def _answers(backbone: Backbone, *, alone: bool = False) -> list[Classification]:
    """Answers of all texts over six adapters of several layers and lengths, in one batch or in one
    batch each."""
    adapters = [
        prepare(
            make_adapter(
                backbone,
                seed=seed,
                prompt_length=(1, 4, 10)[seed % 3],
                insertion_layer=seed % LAYERS,
                generator_input=("embeddings", "hidden")[seed % 2],
                pooling=("answer", "answer", "mean")[seed % 3],
                labels=tuple(f"label {index}" for index in range(2 + seed)),
            ),
            backbone,
        )
        for seed in range(6)
    ]
    inputs = [
        (index % len(adapters), backbone.encoder.encode(text, max_length=backbone.max_tokens))
        for index, text in enumerate(TEXTS)
    ]
    batches = [[item] for item in inputs] if alone else [inputs]
    return [
        answer
        for batch in batches
        for answer in classify(backbone, backbone.pack(rows_of(adapters, batch)), adapters)
    ]


def _distance(some: list[Classification], others: list[Classification]) -> float:
    return max(
        float(np.abs(one.scores - other.scores).max())
        for one, other in zip(some, others, strict=True)
    )


def _backbone(family: str, dtype: torch.dtype, device: str) -> Backbone:
    backbone = backbone_from(copy.deepcopy(model_of(family)), tokenizer_of(family))
    return backbone.to(device=device, dtype=dtype)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_float32_answers_on_the_device_equal_those_on_the_cpu(family: str) -> None:
    device = _answers(_backbone(family, torch.float32, "cuda"))
    assert _distance(device, _answers(_backbone(family, torch.float32, "cpu"))) <= FLOAT32_BOUND


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bfloat16_rows_of_a_mixed_batch_answer_as_they_do_alone(family: str) -> None:
    assert computes_bfloat16(torch.device("cuda"))
    backbone = _backbone(family, torch.bfloat16, "cuda")
    mixed, alone = _answers(backbone), _answers(backbone, alone=True)
    assert _distance(mixed, alone) <= BFLOAT16_BOUND
    for one, other in zip(mixed, alone, strict=True):
        best, second = np.sort(other.scores)[::-1][:2]
        if best - second > BFLOAT16_BOUND:
            assert one.scores.argmax() == other.scores.argmax()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_on_the_device_equal_those_on_the_cpu(family: str) -> None:
    gradients = []
    for device in ("cuda", "cpu"):
        backbone = _backbone(family, torch.float32, device)
        adapter = make_adapter(backbone, insertion_layer=1, generator_input="hidden")
        tensors = {
            name: tensor.to(device).requires_grad_() for name, tensor in adapter.tensors.items()
        }
        prepared = prepare(type(adapter)(adapter.spec, tensors), backbone)
        assert prepared.generator is not None
        inputs = [(0, backbone.encoder.encode(text, max_length=40)) for text in TEXTS[:6]]
        answers = backbone.forward(
            backbone.pack(rows_of([prepared], inputs)), {0: prepared.generator}
        )
        answers.states.square().mean().backward()
        gradients.append(
            {name: tensor.grad.cpu() for name, tensor in tensors.items() if tensor.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)
