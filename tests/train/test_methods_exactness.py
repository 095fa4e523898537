"""Every training method in a packed batch is the method: its logits and its gradients are those of
the same method over a padded batch (tests/support/padded_methods.py).

Observed in float32: logits at most 6e-6 apart, gradients 1.2e-5 of their norm with AVX512 and 4e-5
with AVX2, where only sums change their order. Another method or weight is 1e-3 and more away.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapters.backbone.model import Backbone
from adapters.format.spec import (
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    HeadKind,
    Pooling,
    Site,
)
from tests.support.families import backbone_from, backbone_of, model_of, tokenizer_of
from tests.support.padded_methods import Text, pad, padded_logits
from train.loop.trunk_cache import TrunkCache
from train.methods import METHODS, build
from train.methods.method import Design, Method

BOUND = 1e-5  # on logits of about 1
GRADIENT_BOUND = 5e-5  # on a tensor's gradient, of its own norm
# Of the whole gradient's norm: BERT's key biases have a gradient of 0, but for rounding.
GRADIENT_FLOOR = 1e-6
BFLOAT16_BOUND = 0.1
MAX_LENGTH = 16
LABELS = ("a", "b", "c")
TEXTS: tuple[Text, ...] = (
    ("good card", None),
    ("free win now, bad plot the card is my card and not yours", None),
    ("bad", "free"),
    ("", None),
    ("a good film and a bad plot", "is the card in the account free to win"),
    ("not bad at all", None),
    ("you call me", None),
)
TRUE = torch.tensor([0, 1, 2, 0, 1, 2, 0])

DESIGNS = {
    "hidden": Design(
        prompt_length=3,
        bottleneck=8,
        attention_size=24,
        insertion_layer=2,
        generator_input=GeneratorInput.HIDDEN,
        generator_pooling=GeneratorPooling.ATTENTION,
        final_activation=FinalActivation.NONE,
        pooling=Pooling.ANSWER,
        head=HeadKind.LINEAR,
        max_length=MAX_LENGTH,
        dropout=0.0,
    ),
    "embeddings": Design(
        prompt_length=4,
        bottleneck=6,
        attention_size=8,
        insertion_layer=1,
        generator_input=GeneratorInput.EMBEDDINGS,
        generator_pooling=GeneratorPooling.ATTENTION,
        final_activation=FinalActivation.RELU,
        pooling=Pooling.MEAN,
        head=HeadKind.MLP,
        max_length=MAX_LENGTH,
        dropout=0.0,
    ),
    "mean": Design(
        prompt_length=1,
        bottleneck=5,
        attention_size=8,
        insertion_layer=0,
        generator_input=GeneratorInput.HIDDEN,
        generator_pooling=GeneratorPooling.MEAN,
        final_activation=FinalActivation.TANH,
        pooling=Pooling.ANSWER,
        head=HeadKind.LINEAR,
        max_length=MAX_LENGTH,
        dropout=0.0,
    ),
}
DESIGNS["above"] = replace(DESIGNS["hidden"], tuned_layers=(1, 3), rank=3, scaling=0.5)
DESIGNS["from the prompt on"] = replace(DESIGNS["hidden"], tuned_layers=(2, 4))
DESIGNS["all sites"] = replace(
    DESIGNS["embeddings"], sites=tuple(site for site in Site if site is not Site.ACTIVATED)
)
NAMES = tuple(METHODS)


def cases() -> Iterator[tuple[str, str, str]]:
    """Families, methods and designs, without those that repeat one another."""
    for name in NAMES:
        for family in ("bert", "roberta", "gpt2"):
            # LPT and IDPG read a text's first token, which has seen nothing in a causal model.
            if family != "gpt2" or name not in ("lpt", "idpg"):
                yield family, name, "hidden"
                yield family, name, "embeddings"
    for name in ("idspam", "lpt"):
        yield "bert", name, "mean"
    # Its word embeddings are narrower than its states.
    for name in ("idspam+vectors", "dept", "lora"):
        yield "electra", name, "hidden"
    for name in ("idspam+vectors", "vectors", "lora"):
        yield "distilbert", name, "hidden"
        for design in ("above", "from the prompt on", "all sites"):
            yield "bert", name, design


def stirred(method: Method) -> Method:
    """With every tensor moved away from its start, at which heads and LoRA's B are zero."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in method.tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=random) * 0.15)
    return method


def built(name: str, backbone: Backbone, design: Design) -> Method:
    return build(name, backbone, design, LABELS, torch.Generator().manual_seed(0)).eval()


def cached(method: Method, *, texts: tuple[Text, ...] = TEXTS) -> TrunkCache:
    encoder, length = method.backbone.encoder, method.design.max_length
    encodings = [encoder.encode(*text, max_length=length) for text in texts]
    cache = TrunkCache(
        method.backbone, encodings, method.shape, trunk_layers=method.trunk_layers, place="memory"
    )
    list(cache.fill())
    return cache


def packed_logits(method: Method, cache: TrunkCache) -> Tensor:
    """In the texts' order."""
    everything = list(range(len(cache)))
    batch = cache.pack(everything)
    logits: Tensor = method(batch, cache.trunk(everything, batch))
    return logits[torch.from_numpy(batch.order.argsort())]


def plain_logits(
    method: Method, name: str, plain: Any, tensors: Mapping[str, Tensor] | None = None
) -> Tensor:
    tokenizer = tokenizer_of(plain.config.model_type)
    batch = pad(plain, tokenizer, TEXTS, max_length=method.design.max_length)
    return padded_logits(name, plain, tensors or method.snapshot(), method.design, batch)


def made(family: str, name: str, design: str) -> tuple[Any, Method]:
    """Hugging Face's own model, and a method over a copy of it."""
    plain = model_of(family)
    backbone = backbone_from(plain, tokenizer_of(family))
    return plain, stirred(built(name, backbone, DESIGNS[design]))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name", "design"), list(cases()))
def test_packed_logits_and_gradients_are_those_of_a_padded_batch(
    family: str, name: str, design: str
) -> None:
    plain, method = made(family, name, design)
    cache = cached(method)
    tensors = {key: value.requires_grad_() for key, value in method.snapshot().items()}
    expected = plain_logits(method, name, plain, tensors)
    # Without gradients layers are run by other code (`adapters.layers.bert`).
    with torch.no_grad():
        torch.testing.assert_close(packed_logits(method, cache), expected, rtol=0, atol=BOUND)
    packed = packed_logits(method, cache)
    torch.testing.assert_close(packed, expected, rtol=0, atol=BOUND)
    functional.cross_entropy(expected, TRUE).backward()
    functional.cross_entropy(packed, TRUE).backward()
    assert_same_gradients(method, tensors)


def assert_same_gradients(method: Method, tensors: Mapping[str, Tensor]) -> None:
    gradients = {key: _gradient(tensor) for key, tensor in tensors.items()}
    whole = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    assert gradients.keys() == method.tensors.keys()
    for key, tensor in method.tensors.items():
        apart = float((_gradient(tensor) - gradients[key]).norm())
        bound = GRADIENT_BOUND * float(gradients[key].norm()) + GRADIENT_FLOOR * whole
        assert apart <= bound, key


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fine-tuning"])
def test_the_comparison_would_notice_a_tensor_that_is_one_percent_off(name: str) -> None:
    plain, method = made("bert", name, "hidden")
    tensors = method.snapshot()
    right = plain_logits(method, name, plain)
    for key, tensor in tensors.items():
        wrong = plain_logits(method, name, plain, tensors | {key: 1.01 * tensor})
        assert float((right - wrong).abs().max()) > 10 * BOUND, key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_answer_alone_as_in_a_batch(name: str) -> None:
    _, method = made("bert", name, "embeddings")
    with torch.no_grad():
        together = packed_logits(method, cached(method))
        for text, expected in zip(TEXTS, together, strict=True):
            alone = packed_logits(method, cached(method, texts=(text,)))
            torch.testing.assert_close(alone[0], expected, rtol=0, atol=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("design", ["hidden", "embeddings"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_the_lower_layers_depends_on_no_parameter(name: str, design: str) -> None:
    """Kept before the parameters move, right after they have moved: as in every later epoch."""
    plain = model_of("bert")
    backbone = backbone_from(plain, tokenizer_of("bert"))
    method = built(name, backbone, DESIGNS[design])
    cache = cached(method)
    before = packed_logits(method, cache).detach()
    with torch.no_grad():
        expected = plain_logits(stirred(method), name, plain)
    after = packed_logits(method, cache).detach()
    torch.testing.assert_close(after, expected, rtol=0, atol=BOUND)
    assert float((after - before).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["fine-tuning"])
def test_a_method_that_changes_a_backbone_which_has_already_run_is_evaluated_with_its_changes(
    name: str,
) -> None:
    """`train.experiments.pool.Backbones` hands over a backbone that other methods have used."""
    plain = model_of("bert")
    backbone = backbone_from(plain, tokenizer_of("bert"))
    with torch.no_grad():
        earlier = built("prompt-tuning", backbone, DESIGNS["hidden"])
        packed_logits(earlier, cached(earlier))
        method = stirred(built(name, backbone, DESIGNS["hidden"]))
        packed = packed_logits(method, cached(method))
    torch.testing.assert_close(packed, plain_logits(method, name, plain), rtol=0, atol=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_over_a_bfloat16_backbone_a_method_trains_float32_tensors(name: str) -> None:
    """Answers move by bfloat16's 8 bits: 0.02 were observed, of logits of about 1."""
    wide = stirred(built(name, backbone_of("bert"), DESIGNS["hidden"]))
    bfloat16 = backbone_of("bert").to(dtype=torch.bfloat16)
    narrow = stirred(built(name, bfloat16, DESIGNS["hidden"]))
    assert {tensor.dtype for tensor in narrow.tensors.values()} == {torch.float32}
    packed, expected = (packed_logits(method, cached(method)) for method in (narrow, wide))
    torch.testing.assert_close(packed, expected, rtol=0, atol=BFLOAT16_BOUND)
    functional.cross_entropy(packed, TRUE).backward()
    functional.cross_entropy(expected, TRUE).backward()
    one, other = (
        torch.cat([_gradient(tensor).flatten() for tensor in method.tensors.values()])
        for method in (narrow, wide)
    )
    assert float(functional.cosine_similarity(one, other, dim=0)) > 0.99


def test_fine_tuning_a_bfloat16_backbone_takes_steps_that_bfloat16_would_lose() -> None:
    bfloat16 = backbone_of("bert").to(dtype=torch.bfloat16)
    method = built("fine-tuning", bfloat16, DESIGNS["hidden"])
    weight = method.tensors["model.encoder.layer.0.output.dense.weight"]
    with torch.no_grad():
        method.tensors["head_out"].normal_(generator=torch.Generator().manual_seed(0))
    before = weight.detach().clone()
    assert torch.equal(before.bfloat16().float(), before)
    functional.cross_entropy(packed_logits(method, cached(method)), TRUE).backward()
    torch.optim.SGD(method.tensors.values(), lr=1e-5).step()
    assert not torch.equal(weight, before)
    assert torch.equal(weight.bfloat16().float(), before)
