"""Design and backbone of a run: what training chooses where a setting is left open.

`train.config.recipe` chooses the rest. The measurements are in docs/defaults.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from adapters.backbone.model import Backbone
from adapters.format.spec import (
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    HeadKind,
    Pooling,
    Site,
)
from train.config.settings import (
    ComputeType,
    FitSettings,
    MethodName,
    Preset,
    entries,
    parse_layers,
    parse_sites,
)
from train.errors import SettingsError
from train.methods.method import Design

# What `fit` trains if the user does not say. docs/results.md has the measurements.
DEFAULT_METHOD = MethodName.IDSPAM_VECTORS

MAX_LENGTH = 256
# The paper's c: 34 fits its published parameter counts.
BOTTLENECK = 34
# LoRA's own choice on RoBERTa.
RANK, SITES = 8, (Site.QUERY, Site.VALUE)


@dataclass(frozen=True, slots=True)
class Choices:
    """A preset's values for the switches that a run may leave open.

    layer_share: m as a share of the backbone's layers. learning_rate: for ID-SPAM. weight_decay:
    for data with few rows and labels, which a generator quickly memorises, and for other data.
    """

    prompt_length: int
    bottleneck: int
    layer_share: float
    generator_input: GeneratorInput
    final_activation: FinalActivation
    pooling: Pooling
    head: HeadKind
    learning_rate: float
    weight_decay: tuple[float, float]
    hidden_dropout: float = 0.0


PRESETS: Mapping[Preset, Choices] = {
    Preset.BEST: Choices(
        prompt_length=10,
        bottleneck=BOTTLENECK,
        layer_share=0.5,
        generator_input=GeneratorInput.HIDDEN,
        final_activation=FinalActivation.NONE,
        pooling=Pooling.ANSWER,
        head=HeadKind.LINEAR,
        learning_rate=1e-3,
        weight_decay=(5.0, 0.01),
    ),
    Preset.PAPER: Choices(
        prompt_length=10,
        bottleneck=BOTTLENECK,
        layer_share=0.5,
        generator_input=GeneratorInput.EMBEDDINGS,
        final_activation=FinalActivation.RELU,
        pooling=Pooling.ANSWER,
        head=HeadKind.LINEAR,
        learning_rate=1e-3,
        weight_decay=(0.01, 0.01),
    ),
}


# With vectors a shorter prompt, above more of the layers, is better.
_WITH_VECTORS: Mapping[str, Choices] = {
    "idspam+vectors": replace(
        PRESETS[Preset.BEST],
        prompt_length=5,
        bottleneck=16,
        layer_share=2 / 3,
        hidden_dropout=0.1,
    ),
    "vectors": replace(PRESETS[Preset.BEST], hidden_dropout=0.1),
}


def choices_of(method: str, settings: FitSettings) -> Choices:
    """What a run's method uses where the settings are open."""
    if settings.preset == Preset.PAPER:
        return PRESETS[Preset.PAPER]
    return _WITH_VECTORS.get(method, PRESETS[Preset.BEST])


_GENERATOR = frozenset(
    {
        "prompt_length",
        "bottleneck",
        "attention_size",
        "insertion_layer",
        "generator_input",
        "generator_pooling",
        "final_activation",
    }
)
_TUNING = frozenset({"tuned_layers", "tuning_rate"})
_LORA = _TUNING | {"rank", "alpha", "sites"}
# Of all that train something below the head.
_LAYERS = frozenset({"hidden_dropout"})
# The settings that only some methods have.
OWN_SETTINGS: Mapping[MethodName, frozenset[str]] = {
    MethodName.IDSPAM: _LAYERS | _GENERATOR | {"preset"},
    MethodName.IDSPAM_VECTORS: _LAYERS | _GENERATOR | _TUNING,
    MethodName.VECTORS: _LAYERS | _TUNING,
    MethodName.LORA: _LAYERS | _LORA,
    MethodName.HEAD_ONLY: frozenset(),
    MethodName.PROMPT_TUNING: _LAYERS | {"prompt_length"},
    MethodName.P_TUNING: _LAYERS | {"prompt_length"},
    MethodName.SMOP: _LAYERS,
    MethodName.LPT: _LAYERS | {"prompt_length", "insertion_layer"},
    MethodName.DEPT: _LAYERS,
    MethodName.BEST: _LAYERS | _GENERATOR | _LORA,
}


def method_of(settings: FitSettings) -> MethodName:
    """What a run trains."""
    if settings.method is not None:
        return settings.method
    return MethodName.IDSPAM if settings.preset == Preset.PAPER else DEFAULT_METHOD


def foreign_settings(method: MethodName) -> frozenset[str]:
    """The settings that other methods have and this one has not."""
    return frozenset[str]().union(*OWN_SETTINGS.values()) - OWN_SETTINGS[method]


def check_method(settings: FitSettings) -> None:
    """Refuse settings that the run's method does not have, and those of `check_generator`.

    Raises:
        SettingsError: with every one of them.
    """
    method = method_of(settings)
    foreign = foreign_settings(method)
    flags = {entry.name: entry.flag for entry in entries()}
    faults = []
    for name in (entry.name for entry in entries() if entry.name in foreign):
        if not settings.is_open(name):
            have = [each for each, own in OWN_SETTINGS.items() if name in own]
            value = getattr(settings, name)
            faults.append(
                f"{flags[name]} {value}: --method {method} has no such setting; "
                f"{', '.join(have)} {'has' if len(have) == 1 else 'have'} it"
            )
    if faults:
        raise SettingsError(faults)
    check_generator(settings)


def check_generator(settings: FitSettings) -> None:
    """
    Raises:
        SettingsError: a setting that has no effect beside another one, whatever the method.
    """
    size = settings.attention_size
    if size is not None and settings.generator_pooling == GeneratorPooling.MEAN:
        raise SettingsError(
            [f"--attention-size {size}: --generator-pooling mean has no queries and keys"]
        )


def settings_for(method: str, settings: FitSettings) -> FitSettings:
    """An experiment's settings for one of its methods: `idspam-paper` has a preset of its own."""
    return replace(settings, preset=Preset.PAPER) if method == "idspam-paper" else settings


class Sizes(Protocol):
    """What a design depends on of a backbone; `Backbone` has it."""

    @property
    def layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class KnownSizes:
    """Those of a backbone that is not loaded."""

    layers: int
    hidden_size: int
    max_tokens: int

    @classmethod
    def of(cls, backbone: Sizes) -> Self:
        return cls(backbone.layers, backbone.hidden_size, backbone.max_tokens)


def design_of(method: str, settings: FitSettings, backbone: Sizes) -> Design:
    """How a run's method is built.

    Raises:
        SettingsError: this backbone has no such layer, or does not take texts of this length.
    """
    preset = choices_of(method, settings)
    layer, length = settings.insertion_layer, settings.max_length
    faults = []
    if layer is not None and layer >= backbone.layers:
        faults.append(
            f"--insertion-layer {layer}: this backbone has layers 0..{backbone.layers - 1}"
        )
    if length is not None and length > backbone.max_tokens:
        faults.append(f"--max-length {length}: this backbone takes {backbone.max_tokens} tokens")
    layers = (0, backbone.layers)
    if settings.tuned_layers is not None:
        layers = parse_layers(settings.tuned_layers)
        if layers[1] > backbone.layers:
            faults.append(
                f"--tuned-layers {settings.tuned_layers}: "
                f"this backbone has layers 0..{backbone.layers - 1}"
            )
    if faults:
        raise SettingsError(faults)
    rank = settings.rank or RANK
    return Design(
        prompt_length=settings.prompt_length or preset.prompt_length,
        bottleneck=settings.bottleneck or preset.bottleneck,
        attention_size=settings.attention_size or backbone.hidden_size,
        insertion_layer=round(preset.layer_share * backbone.layers) if layer is None else layer,
        generator_input=settings.generator_input or preset.generator_input,
        generator_pooling=settings.generator_pooling,
        final_activation=settings.final_activation or preset.final_activation,
        pooling=settings.pooling or preset.pooling,
        head=settings.head or preset.head,
        max_length=length or min(MAX_LENGTH, backbone.max_tokens),
        dropout=settings.dropout,
        hidden_dropout=(
            preset.hidden_dropout if settings.hidden_dropout is None else settings.hidden_dropout
        ),
        tuned_layers=layers,
        rank=rank,
        scaling=2.0 if settings.alpha is None else settings.alpha / rank,
        sites=SITES if settings.sites is None else parse_sites(settings.sites),
    )


def load_backbone_for(settings: FitSettings) -> Backbone:
    """Load a run's backbone (`load_backbone_on`).

    Raises:
        AdapterError: it cannot be loaded or run.
    """
    return load_backbone_on(settings.backbone, device=settings.device, dtype=settings.dtype)


def load_backbone_on(name: str | None, *, device: str, dtype: ComputeType | None) -> Backbone:
    """Load a backbone: in float32 on a CPU and the best type on a GPU, if the type is open.

    Args:
        name: None is the default backbone.

    Raises:
        AdapterError: it cannot be loaded or run.
    """
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    chosen = dtype or (ComputeType.AUTO if gpu else ComputeType.FLOAT32)
    return load_backbone(name or DEFAULT_BACKBONE, device=device, dtype=chosen)
