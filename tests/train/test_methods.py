"""The training methods by themselves: how large they are, how they start, what they leave alone,
and that they learn. That they compute what they should is in test_methods_exactness.py.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from adapters.backbone.model import Backbone
from adapters.format.spec import (
    BackboneIdentity,
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    HeadKind,
    Pooling,
    Site,
)
from adapters.tokenizer import TextEncoder
from tests.support.families import backbone_of, model_of, tokenizer_of
from tests.support.padded_methods import good_or_bad
from tests.support.tiny_models import make_backbone
from train.config.settings import FitSettings
from train.fit.fit import Training, set_up
from train.loop.progress import Progress
from train.loop.trunk_cache import TrunkCache
from train.methods import METHODS, build
from train.methods.method import Design, Method
from train.metrics import Metric

LABELS = ("a", "b", "c")
TEXTS = ("good card", "free win now, bad plot the card is my card", "bad", "not bad at all")
DESIGN = Design(
    prompt_length=3,
    bottleneck=8,
    attention_size=24,
    insertion_layer=2,
    generator_input=GeneratorInput.HIDDEN,
    generator_pooling=GeneratorPooling.ATTENTION,
    final_activation=FinalActivation.RELU,
    pooling=Pooling.ANSWER,
    head=HeadKind.LINEAR,
    max_length=24,
    dropout=0.0,
)
CHANGING = [name for name, kind in METHODS.items() if kind.changes_backbone]
FROZEN = [name for name in METHODS if name not in CHANGING]

_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def roberta(*, large: bool) -> Any:
    return AutoConfig.for_model("roberta", **_ROBERTA, **(_LARGE if large else {}))


def shaped(config: Any) -> Backbone:
    """A backbone of true shapes without any weight."""
    with torch.device("meta"):
        model = AutoModel.from_config(config, add_pooling_layer=False)
    encoder = TextEncoder(tokenizer_of("roberta").backend_tokenizer)
    return Backbone(model, encoder, BackboneIdentity(name="shapes", fingerprint="0" * 64))


def built(name: str, backbone: Backbone, *, seed: int = 0, design: Design = DESIGN) -> Method:
    return build(name, backbone, design, LABELS, torch.Generator().manual_seed(seed)).eval()


def stir(method: Method) -> None:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in method.tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=random) * 0.15)


@torch.no_grad()
def logits(method: Method, texts: tuple[str, ...] = TEXTS) -> Tensor:
    """In the texts' order."""
    encoder, length = method.backbone.encoder, method.design.max_length
    encodings = [encoder.encode(text, None, max_length=length) for text in texts]
    cache = TrunkCache(
        method.backbone, encodings, method.shape, trunk_layers=method.trunk_layers, place="off"
    )
    everything = list(range(len(texts)))
    batch = cache.pack(everything)
    logits: Tensor = method(batch, cache.trunk(everything, batch))
    return logits[torch.from_numpy(batch.order.argsort())]


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in some.items()
    )


# Published, or what the published shapes come to: no class head, and not all biases.
@pytest.mark.parametrize(
    ("name", "large", "left_out", "published"),
    [
        ("idspam", False, ("generator.down.bias",), 2_064_384),
        ("idspam", True, ("generator.down.bias",), 3_538_944),
        ("lpt", False, ("generator.down.bias", "generator.up.bias"), 2_162_688),
        ("lpt", True, ("generator.down.bias", "generator.up.bias"), 2_883_584),
        ("idpg", True, (), 216 * 1024),
        ("vectors", False, (), 12 * (7 * 768 + 2 * 3072)),
        ("lora", False, (), 294_912),
        ("lora", True, (), 786_432),
        ("prompt-tuning", False, (), 10 * 768),
        ("prompt-tuning", True, (), 10 * 1024),
        ("p-tuning", False, (), 10 * 768 + 3 * (768 * 768 + 768)),
        ("dept", False, (), 76_800),
        ("smop", False, (), 4 * 5 * 768 + 768 * 4),
        ("head-only", False, (), 0),
        ("fine-tuning", False, (), 124_055_040),
    ],
)
def test_a_method_has_the_published_number_of_parameters(
    name: str, large: bool, left_out: tuple[str, ...], published: int
) -> None:
    config = roberta(large=large)
    design = replace(DESIGN, prompt_length=10, bottleneck=34, attention_size=config.hidden_size)
    method = built(name, shaped(config), design=design)
    sizes = {key: tensor.numel() for key, tensor in method.tensors.items()}
    head = sum(size for key, size in sizes.items() if key.startswith("head"))
    assert head == (config.hidden_size + 1) * len(LABELS)
    assert sum(sizes.values()) == method.size
    assert method.size - head - sum(sizes[key] for key in left_out) == published


def test_the_papers_count_of_lora_is_rank_16_in_every_linear_layer_of_the_masked_lm_model() -> None:
    import peft

    config: Any = peft.LoraConfig(
        r=16, target_modules=["query", "key", "value", "dense", "decoder"]
    )
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(roberta(large=False))
        adapted = peft.inject_adapter_in_model(config, model)
    trained = (item.numel() for item in adapted.parameters() if item.requires_grad)
    assert sum(trained) == 3_495_312


@pytest.mark.slow
@pytest.mark.parametrize("head", list(HeadKind))
@pytest.mark.parametrize("name", METHODS)
def test_the_first_prediction_is_uniform(name: str, head: HeadKind) -> None:
    method = built(name, backbone_of("bert"), design=replace(DESIGN, head=head))
    assert torch.equal(logits(method), torch.zeros(len(TEXTS), len(LABELS)))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_generator_decides_on_the_start_and_nothing_else_does(name: str) -> None:
    one = built(name, backbone_of("bert")).snapshot()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    same_seed = built(name, backbone_of("bert")).snapshot()
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, same_seed)
    other = built(name, backbone_of("bert"), seed=1).snapshot()
    # Of these nothing is drawn: a head of zeros, and the backbone's own weights.
    drawn = name not in ("vectors", "head-only", "head-only-mean", "fine-tuning")
    assert same(one, other) is not drawn


@pytest.mark.parametrize("name", METHODS)
def test_a_snapshot_brings_a_method_back(name: str) -> None:
    method = built(name, backbone_of("bert"))
    stir(method)
    kept, before = method.snapshot(), logits(method)
    assert kept.keys() == method.tensors.keys()
    assert not any(tensor.requires_grad for tensor in kept.values())
    copies = {key: tensor.clone() for key, tensor in kept.items()}
    stir(method)
    assert same(kept, copies)
    assert not torch.equal(logits(method), before)
    assert method.restore(kept) is method
    assert same(method.snapshot(), kept)
    assert torch.equal(logits(method), before)
    assert all(tensor.requires_grad for tensor in method.tensors.values())


def test_kept_layers_are_those_below_the_first_one_that_a_parameter_reaches() -> None:
    kept = {name: built(name, backbone_of("bert")).trunk_layers for name in METHODS}
    expected = {"idspam": 2, "idspam-paper": 2, "lpt": 2, "head-only": 4, "head-only-mean": 4}
    assert kept == dict.fromkeys(METHODS, 0) | expected


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_dropout_works_in_training_alone(name: str) -> None:
    method = built(name, backbone_of("bert"), design=replace(DESIGN, dropout=0.5))
    stir(method)
    assert torch.equal(logits(method), logits(method))
    method.train()
    assert not torch.equal(logits(method), logits(method))


def test_smops_router_is_noisy_in_training_alone() -> None:
    method = built("smop", backbone_of("bert"))
    stir(method)
    calm = logits(method)
    assert torch.equal(logits(method), calm)
    method.train()
    noisy = logits(method)
    assert not torch.equal(noisy, calm)
    torch.testing.assert_close(noisy, calm, rtol=0, atol=0.1)


def test_dept_takes_texts_beyond_its_table() -> None:
    backbone = make_backbone(max_tokens=300)
    method = built("dept", backbone, design=replace(DESIGN, max_length=300))
    stir(method)
    long = "a " * 290
    both = logits(method, (long, "good card"))
    torch.testing.assert_close(both[:1], logits(method, (long,)), rtol=0, atol=1e-5)
    assert torch.isfinite(both).all()
    assert not backbone.word_embeddings._forward_hooks


class Losses(Progress):
    """The mean loss after every step of an epoch."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def advance(
        self,
        texts: int,  # noqa: ARG002  # Progress has it
        *,
        loss: float | None = None,
        accuracy: float | None = None,  # noqa: ARG002  # Progress has it
    ) -> None:
        if loss is not None:
            self.means.append(loss)


def trained(
    name: str, backbone: Backbone, folder: Path
) -> tuple[Training, Losses, dict[str, Tensor]]:
    """A run to its end, what was told of it, and the weights that it began with."""
    settings = FitSettings(
        device="cpu",
        epochs=10,
        patience=10,
        batch_size=16,
        learning_rate=2e-3 if name == "fine-tuning" else 1e-2,
        weight_decay=0.0,
        seed=3,
    )
    training = set_up(
        name,
        {"train": good_or_bad(48, seed=1)},
        settings,
        backbone,
        selection="selection",
        metric=Metric.ACCURACY,
        checkpoint_file=folder / "state",
        progress=Progress(),
    )
    start, losses = training.method.snapshot(), Losses()
    training.loop.fit(losses)
    return training, losses, start


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_every_tensor_of_it_takes_part(name: str, tmp_path: Path) -> None:
    backbone = backbone_of("bert")
    weights = {key: value.clone() for key, value in backbone.state_dict().items()}
    training, losses, start = trained(name, backbone, tmp_path)
    assert losses.means[0] == pytest.approx(math.log(2))
    assert losses.means[-1] < 0.95 * losses.means[0]
    end = training.method.snapshot()
    assert [key for key in start if torch.equal(start[key], end[key])] == []
    if name in FROZEN:
        assert same(dict(backbone.state_dict()), weights)
        assert not any(item.requires_grad for item in backbone.editable_model().parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGING)
def test_a_method_that_changes_its_backbone_leaves_another_one_alone(
    name: str, tmp_path: Path
) -> None:
    own, other = backbone_of("bert"), backbone_of("bert")
    untouched = built("idspam", other)
    stir(untouched)
    weights = {key: value.clone() for key, value in other.state_dict().items()}
    before = logits(untouched)
    trained(name, own, tmp_path)
    assert not same(dict(own.state_dict()), weights)
    assert same(dict(other.state_dict()), weights)
    assert torch.equal(logits(untouched), before)


def test_lora_is_pefts_function_with_pefts_start() -> None:
    import peft

    plain: Any = model_of("bert")
    sites = ("query", "key", "value", "up", "down")
    config = peft.LoraConfig(
        r=5,
        lora_alpha=10,
        target_modules=["query", "key", "value", "intermediate.dense", r"output.dense"],
        exclude_modules=[r"attention.output.dense"],
    )
    design = replace(DESIGN, rank=5, scaling=2.0, sites=tuple(map(Site, sites)))
    method = built("lora", backbone_of("bert"), design=design)
    adapted: Any = peft.inject_adapter_in_model(config, plain)
    modules = {
        name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")
    }
    assert len(modules) == 4 * len(sites)
    ends = dict(
        zip(sites, ("query", "key", "value", "intermediate.dense", "output.dense"), strict=True)
    )
    for site, end in ends.items():
        starts = method.tensors[f"tuning.{site}.a"]
        for layer in range(4):
            (module,) = (
                module
                for name, module in modules.items()
                if name.startswith(f"encoder.layer.{layer}.") and name.endswith(end)
            )
            theirs, bound = module.lora_A["default"].weight, starts.shape[1] ** -0.5
            for start in (starts[layer], theirs):
                assert 0.8 * bound < float(start.detach().abs().max()) <= bound
                assert abs(float(start.detach().mean())) < 0.2 * bound
            assert not module.lora_B["default"].weight.any()
    assert not any(tensor.any() for name, tensor in method.tensors.items() if name.endswith(".b"))
    stir(method)
    for name, module in modules.items():
        site = next(site for site, end in ends.items() if name.endswith(end))
        layer = int(name.split(".")[2])
        module.lora_A["default"].weight.data = method.tensors[f"tuning.{site}.a"][layer].detach().T
        module.lora_B["default"].weight.data = method.tensors[f"tuning.{site}.b"][layer].detach().T
    tokenizer: Any = tokenizer_of("bert")
    for text, row in zip(TEXTS, logits(method), strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            state = adapted(**inputs).last_hidden_state[0, 0]
        out, bias = method.tensors["head.out.weight"], method.tensors["head.out.bias"]
        torch.testing.assert_close(row, (state @ out + bias).detach(), rtol=0, atol=1e-5)
