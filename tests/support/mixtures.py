"""Random batches: texts, and adapters of all kinds for them."""

import random
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from adapters.adapter import Classification, classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import (
    AttentionPrompt,
    EmbeddingTable,
    FinalActivation,
    FirstTokenPrompt,
    GeneratorInput,
    GeneratorPooling,
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
from tests.support.families import HIDDEN, LAYERS, POSITIONS
from tests.support.tiny_models import make_adapter

LINEAR_MAPS = tuple(site for site in Site if site is not Site.ACTIVATED)
WORDS = (
    "good",
    "bad",
    "card",
    "free",
    "Café",
    "東京",
    "42",
    "!",
    "<pad>",
    "[SEP]",
    "<|endoftext|>",
    "the",
)


@dataclass(frozen=True, slots=True)
class Text:
    """One input: which adapter of the case it goes to, and its text or pair."""

    adapter: int
    text: str
    pair: str | None


@dataclass(frozen=True, slots=True)
class Case:
    """Adapters, as keyword arguments of `make_adapter`, and the texts of one batch."""

    adapters: tuple[dict[str, object], ...]
    texts: tuple[Text, ...]


@st.composite
def adapter_fields(draw: DrawFn) -> dict[str, object]:
    count = draw(st.integers(1, 7))
    return {
        "seed": draw(st.integers(0, 2**16)),
        "labels": tuple(f"label {i}" for i in range(count)),
        "activation": "sigmoid" if count == 1 else draw(st.sampled_from(("softmax", "sigmoid"))),
        "insertion_layer": draw(st.integers(0, LAYERS - 1)),
        "prompt_length": draw(st.sampled_from((1, 2, 5, 10))),
        "bottleneck": draw(st.sampled_from((1, 6, 34))),
        "attention_size": draw(st.sampled_from((1, 8, 24, 40))),
        "generator_input": draw(st.sampled_from(("embeddings", "hidden"))),
        "generator_pooling": draw(st.sampled_from(("attention", "attention", "mean"))),
        "final_activation": draw(st.sampled_from(("relu", "tanh", "none"))),
        "pooling": draw(st.sampled_from(("answer", "mean"))),
        "head": draw(st.sampled_from(("linear", "mlp"))),
        "calibration": {"temperature": draw(st.sampled_from((0.5, 1.0, 3.0)))},
        "max_length": draw(st.sampled_from((5, 16, POSITIONS))),
    }


@st.composite
def prompts(draw: DrawFn, width: int) -> Prompt | None:
    """A prompt of any kind, or none. width: of the word embeddings."""
    length, layer = draw(st.sampled_from((1, 3, 8))), draw(st.integers(0, LAYERS - 1))
    match draw(st.sampled_from(("none", "attention", "first-token", "routed", "static", "table"))):
        case "attention":
            return AttentionPrompt(
                length=length,
                layer=layer,
                source=draw(st.sampled_from(GeneratorInput)),
                pooling=draw(st.sampled_from(GeneratorPooling)),
                bottleneck=6,
                attention_size=draw(st.sampled_from((8, HIDDEN))),
                final_activation=draw(st.sampled_from(FinalActivation)),
            )
        case "first-token":
            return FirstTokenPrompt(length=length, layer=layer, bottleneck=6)
        case "routed":
            return RoutedPrompt(length=length, layer=layer, prompts=draw(st.integers(2, 5)))
        case "static":
            # Positions are free after a shift of at most 8: texts have at most 40 tokens here.
            shifts = draw(st.booleans())
            return StaticPrompt(length=length, layer=0 if shifts else layer, shifts_text=shifts)
        case "table":
            table = EmbeddingTable(positions=draw(st.sampled_from((1, 4, 60))), rank=3, width=width)
            return StaticPrompt(length=length, shifts_text=draw(st.booleans()), table=table)
        case _:
            return None


@st.composite
def tunings(draw: DrawFn, f: int) -> Tuning | None:
    """A tuning of any kind and range of layers, or none. f: width of the feed-forward part."""
    first = draw(st.integers(0, LAYERS - 1))
    layers = (first, draw(st.integers(first + 1, LAYERS)))
    match draw(st.sampled_from(("none", "vectors", "lora"))):
        case "vectors":
            return VectorTuning(layers=layers, intermediate_size=f, activated=draw(st.booleans()))
        case "lora":
            sites = draw(st.sets(st.sampled_from(LINEAR_MAPS), min_size=1))
            return LoraTuning(
                layers=layers,
                intermediate_size=f,
                rank=draw(st.sampled_from((1, 2, 8))),
                scaling=draw(st.sampled_from((0.5, 2.0))),
                sites=tuple(site for site in LINEAR_MAPS if site in sites),
            )
        case _:
            return None


@st.composite
def fields_of_any_kind(draw: DrawFn, backbone: Backbone) -> dict[str, object]:
    return {
        "seed": draw(st.integers(0, 2**16)),
        "labels": ("a", "b", "c"),
        "activation": draw(st.sampled_from(("softmax", "sigmoid"))),
        "prompt": draw(prompts(backbone.embedding_size)),
        "tuning": draw(tunings(backbone.intermediate_size)),
        "head": draw(st.sampled_from(("linear", "mlp"))),
        "hidden": draw(st.sampled_from(HiddenActivation)),
        "pooling": draw(st.sampled_from(Pooling)),
        "max_length": draw(st.sampled_from((5, 16, POSITIONS - 8))),
    }


@st.composite
def mixtures(draw: DrawFn, backbone: Backbone) -> Case:
    """Adapters of all kinds and texts for them, several rows of one length among them."""
    adapters = draw(st.lists(fields_of_any_kind(backbone), min_size=3, max_size=8))
    texts = st.builds(
        Text,
        adapter=st.integers(0, len(adapters) - 1),
        text=sentences(),
        pair=st.none() | sentences(least=1),
    )
    return Case(tuple(adapters), tuple(draw(st.lists(texts, min_size=6, max_size=14))))


@st.composite
def sentences(draw: DrawFn, *, least: int = 0) -> str:
    """Texts from empty to several times the maximum of the backbone."""
    count = draw(st.sampled_from((least, 1, 2, 3, 8, 20, 4 * POSITIONS)))
    chosen = random.Random(draw(st.integers(0, 2**16)))
    return " ".join(chosen.choice(WORDS) for _ in range(count))


@st.composite
def cases(draw: DrawFn) -> Case:
    adapters = draw(st.lists(adapter_fields(), min_size=2, max_size=5))
    texts = st.builds(
        Text,
        adapter=st.integers(0, len(adapters) - 1),
        text=sentences(),
        pair=st.none() | sentences(least=1),
    )
    return Case(tuple(adapters), tuple(draw(st.lists(texts, min_size=4, max_size=10))))


def classify_packed(
    backbone: Backbone, adapters: list[Adapter], texts: tuple[Text, ...]
) -> list[Classification]:
    prepared = [prepare(adapter, backbone) for adapter in adapters]
    inputs = [
        (
            item.adapter,
            backbone.encoder.encode(
                item.text, item.pair, max_length=adapters[item.adapter].spec.max_length
            ),
        )
        for item in texts
    ]
    return classify(backbone, backbone.pack(rows_of(prepared, inputs)), prepared)


def adapters_of(backbone: Backbone, case: Case) -> list[Adapter]:
    return [make_adapter(backbone, **fields) for fields in case.adapters]  # type: ignore[arg-type]  # drawn fields
