"""Design and backbone of a run: what training chooses where a setting is left open.

`train.config.recipe` chooses the rest. The measurements are in docs/defaults.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from adapters.backbone.model import Backbone
from adapters.format.spec import FinalActivation, GeneratorInput, HeadKind, Pooling
from train.config.settings import ComputeType, FitSettings, Preset
from train.errors import SettingsError
from train.methods.method import Design

MAX_LENGTH = 256
# The paper's c: 34 fits its published parameter counts.
BOTTLENECK = 34


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


def settings_for(method: str, settings: FitSettings) -> FitSettings:
    """An experiment's settings for one of its methods: `idspam-paper` has a preset of its own."""
    return replace(settings, preset=Preset.PAPER) if method == "idspam-paper" else settings


def design_of(settings: FitSettings, backbone: Backbone) -> Design:
    """How a run's method is built.

    Raises:
        SettingsError: this backbone has no such layer, or does not take texts of this length.
    """
    preset = PRESETS[settings.preset]
    layer, length = settings.insertion_layer, settings.max_length
    faults = []
    if layer is not None and layer >= backbone.layers:
        faults.append(
            f"--insertion-layer {layer}: this backbone has layers 0..{backbone.layers - 1}"
        )
    if length is not None and length > backbone.max_tokens:
        faults.append(f"--max-length {length}: this backbone takes {backbone.max_tokens} tokens")
    if faults:
        raise SettingsError(faults)
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
    )


def load_backbone_for(settings: FitSettings) -> Backbone:
    """Load a run's backbone: in float32 on a CPU and the best type on a GPU, if the type is open.

    Raises:
        AdapterError: it cannot be loaded or run.
    """
    gpu = settings.device.startswith("cuda") or (
        settings.device == "auto" and torch.cuda.is_available()
    )
    dtype = settings.dtype or (ComputeType.AUTO if gpu else ComputeType.FLOAT32)
    return load_backbone(settings.backbone or DEFAULT_BACKBONE, device=settings.device, dtype=dtype)
