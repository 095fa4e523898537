"""An adapter of every kind for one backbone: prompts, tunings and heads in many combinations."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import (
    AttentionPrompt,
    EmbeddingTable,
    FinalActivation,
    FirstTokenPrompt,
    GeneratorInput,
    GeneratorPooling,
    HeadKind,
    HiddenActivation,
    LoraTuning,
    Pooling,
    Prompt,
    RoutedPrompt,
    Site,
    StaticPrompt,
    Tuning,
    VectorTuning,
)
from tests.support.engine_harness import EngineHarness, running_engine
from tests.support.tiny_models import make_adapter

LINEAR = tuple(site for site in Site if site is not Site.ACTIVATED)


def adapters_of_all_kinds(backbone: Backbone) -> dict[str, Adapter]:
    """By a name of the kind. The texts of all of them may be half as long as the backbone takes."""
    return {
        name: make_adapter(
            backbone,
            seed=seed,
            labels=tuple(f"l{index}" for index in range(2 + seed % 4)),
            max_length=backbone.max_tokens // 2,
            **fields,
        )
        for seed, (name, fields) in enumerate(_fields(backbone).items())
    }


def _fields(backbone: Backbone) -> dict[str, dict[str, Any]]:
    n, f, layers = backbone.hidden_size, backbone.intermediate_size, backbone.layers
    width = backbone.word_embeddings.embedding_dim

    def attention(**fields: Any) -> Prompt:
        defaults: dict[str, Any] = {"length": 3, "layer": 1, "bottleneck": 8, "attention_size": n}
        return AttentionPrompt(**defaults | fields)

    def vectors(first: int = 0, end: int = layers, **fields: Any) -> Tuning:
        return VectorTuning(layers=(first, end), intermediate_size=f, **fields)

    def lora(*sites: Site, rank: int, first: int = 0, end: int = layers) -> Tuning:
        return LoraTuning(
            layers=(first, end), intermediate_size=f, rank=rank, scaling=1.5, sites=sites
        )

    mean: dict[str, Any] = {"pooling": Pooling.MEAN}
    first: dict[str, Any] = {"pooling": Pooling.FIRST}
    relu: dict[str, Any] = {"head": HeadKind.MLP, "hidden": HiddenActivation.RELU}
    gelu = mean | {"head": HeadKind.MLP, "hidden": HiddenActivation.GELU}
    table = EmbeddingTable(positions=5, rank=2, width=width)
    return {
        "idspam": {"prompt": attention(source=GeneratorInput.HIDDEN)},
        "idspam+vectors": {
            "prompt": attention(source=GeneratorInput.HIDDEN, layer=2, length=5),
            "tuning": vectors(),
        },
        "idspam of the embeddings": {"prompt": attention(final_activation=FinalActivation.TANH)},
        "mean of the tokens": {"prompt": attention(pooling=GeneratorPooling.MEAN)} | mean,
        "lpt": {"prompt": FirstTokenPrompt(length=4, layer=2, bottleneck=6)},
        "lpt+vectors": {
            "prompt": FirstTokenPrompt(length=1, layer=0, bottleneck=3),
            "tuning": vectors(1, 2),
        },
        "smop": {"prompt": RoutedPrompt(length=2, prompts=3)},
        "smop+lora": {
            "prompt": RoutedPrompt(length=2, prompts=5, layer=1),
            "tuning": lora(Site.UP, rank=3),
        },
        "prompt tuning": {"prompt": StaticPrompt(length=6)} | first,
        "prompt tuning, shifted": {"prompt": StaticPrompt(length=2, shifts_text=True)} | relu,
        "dept": {"prompt": StaticPrompt(length=2, table=table, shifts_text=True)},
        "dept+vectors": {
            "prompt": StaticPrompt(length=1, layer=1, table=table),
            "tuning": vectors(activated=True),
        },
        "vectors": {"prompt": None, "tuning": vectors()},
        "ia3": {"prompt": None, "tuning": vectors(0, 2, activated=True)} | gelu,
        "lora": {"prompt": None, "tuning": lora(Site.QUERY, Site.VALUE, rank=8)},
        "lora everywhere": {"prompt": None, "tuning": lora(*LINEAR, rank=20)} | first,
        "lora above": {
            "prompt": attention(layer=0),
            "tuning": lora(Site.KEY, Site.DOWN, rank=1, first=1, end=2),
        },
        "head": {"prompt": None},
        "head of two layers": {"prompt": None} | gelu,
    }


@asynccontextmanager
async def serving_kinds(
    root: Path, backbone: Backbone, **limits: int
) -> AsyncIterator[EngineHarness]:
    """A started engine with an adapter of every kind in its store."""
    adapters = {
        name.replace(" ", "-").replace(",", "").replace("+", "-"): adapter
        for name, adapter in adapters_of_all_kinds(backbone).items()
    }
    limits = {"max_batch_tokens": 4096} | limits
    async with running_engine(root, backbone, adapters, **limits) as harness:
        yield harness
