"""What every system of a comparison is: parameters, and how a packed batch's logits come of them.

A method knows no optimiser, no data and no file. Everything around it - data, order, budget, class
head, selection - is the same for all of them, so that a comparison compares methods.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.backbone.model import Backbone, Trunk
from adapters.format.spec import (
    AdapterSpec,
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    HeadKind,
    Pooling,
)
from adapters.packed.head import HeadWeights, logits
from adapters.packed.layout import Layout, pool_rows
from adapters.packed.packing import PackedBatch


@dataclass(frozen=True, slots=True)
class Design:
    """How a method is built, nothing left open. Fields are those of `AdapterSpec`, and the dropout.

    Baselines take from it what they have: prompt length, layer, pooling and head.
    """

    prompt_length: int
    bottleneck: int
    attention_size: int
    insertion_layer: int
    generator_input: GeneratorInput
    generator_pooling: GeneratorPooling
    final_activation: FinalActivation
    pooling: Pooling
    head: HeadKind
    max_length: int
    dropout: float

    def spec(self, backbone: Backbone, labels: tuple[str, ...]) -> AdapterSpec:
        """The spec of an adapter of this backbone for these labels."""
        switches = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "dropout"
        }
        return AdapterSpec(
            backbone=backbone.identity,
            tokenizer_sha256=backbone.encoder.sha256,
            hidden_size=backbone.hidden_size,
            labels=labels,
            **switches,
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """What a batch is packed by where there is no adapter spec (`adapters.packed.packing.RowShape`)."""

    prompt_length: int = 0
    insertion_layer: int = 0
    generator_input: GeneratorInput = GeneratorInput.HIDDEN
    pooling: Pooling = Pooling.ANSWER


class Method(nn.Module, ABC):
    """One system under training.

    Args:
        backbone: frozen, but for a method that says `changes_backbone`.
        design: its switches; a method reads what concerns it.
        random: where initial values come from.
    """

    # AdamW's peak rate and decay where the settings give none; None is the preset's. How they were
    # chosen is in docs/research.md.
    learning_rate: ClassVar[float | None]
    weight_decay: ClassVar[float | None] = 0.01
    # Whether the backbone's modules or weights change, so that nothing else can use it afterwards.
    changes_backbone: ClassVar[bool] = False

    def __init__(
        self, backbone: Backbone, design: Design, labels: int, random: torch.Generator
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.design = design
        self.labels = labels
        self.random = random

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """How its rows stand in a batch."""

    @property
    @abstractmethod
    def head(self) -> HeadWeights:
        """The class head."""

    @property
    def kept_layers(self) -> int:
        """Layers that no parameter reaches: what leaves them is the same in every epoch."""
        return self.shape.insertion_layer

    @abstractmethod
    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        """What the head reads of every row: [rows, n], in the batch's order.

        Args:
            trunk: the batch after `kept_layers` layers, without gradients.
        """

    def forward(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        """Logits, float32 [rows, labels], in the batch's order."""
        states = self.states(batch, trunk).float()
        if self.training and self.design.dropout:
            states = functional.dropout(states, self.design.dropout)
        return logits(states, self.head)

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def rate_factor(self, name: str) -> float:
        """What the learning rate is multiplied by for one of `tensors`."""
        return 1.0

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The trained parameters by the factor of their learning rate, as optimisers take them."""
        found: dict[float, list[nn.Parameter]] = {}
        for name, tensor in self.tensors.items():
            found.setdefault(self.rate_factor(name), []).append(tensor)
        return [
            {"params": tensors, "lr": rate * factor, "factor": factor}
            for factor, tensors in found.items()
        ]

    @property
    def size(self) -> int:
        """Trained parameters, the class head's included."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def snapshot(self) -> dict[str, Tensor]:
        """A detached copy of every trained tensor, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> Self:
        """Put back what `snapshot` gave."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(tensors[name])
        return self


class Baseline(Method):
    """A method that is not ID-SPAM: with a class head like an adapter's, which starts at zero."""

    def __init__(
        self, backbone: Backbone, design: Design, labels: int, random: torch.Generator
    ) -> None:
        super().__init__(backbone, design, labels, random)
        n = backbone.hidden_size
        if design.head is HeadKind.MLP:
            self.head_dense = self.normal((n, n), fan_in=n)
            self.head_dense_bias = nn.Parameter(torch.zeros(n))
        self.head_out = nn.Parameter(torch.zeros(n, labels))
        self.head_bias = nn.Parameter(torch.zeros(labels))

    @property
    def head(self) -> HeadWeights:
        return HeadWeights(
            getattr(self, "head_dense", None),
            getattr(self, "head_dense_bias", None),
            self.head_out,
            self.head_bias,
        )

    @property
    def shape(self) -> Shape:
        return Shape(pooling=self.design.pooling)

    def normal(self, shape: tuple[int, ...], *, fan_in: int) -> nn.Parameter:
        """Drawn from N(0, 1 / fan_in)."""
        return nn.Parameter(torch.randn(shape, generator=self.random) / math.sqrt(fan_in))


class PromptBaseline(Baseline):
    """A baseline that puts soft prompts in front of its rows at one layer, as ID-SPAM does."""

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @abstractmethod
    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        """[rows * t, n], row by row in the batch's order; `trunk` is at the insertion layer."""

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        hidden, layout = inserted(trunk.hidden, self.prompts(trunk, batch), batch)
        first, last = self.shape.insertion_layer, self.backbone.layers - 1
        return read(self.backbone, self.backbone.run_layers(hidden, first, last, layout), batch)


def inserted(hidden: Tensor, prompts: Tensor, batch: PackedBatch) -> tuple[Tensor, Layout]:
    """Prompts in front of their rows: [T, n] and [rows * t, n] -> [T + rows * t, n]."""
    insertion = batch.insertions[0]
    joined = torch.cat([hidden, prompts.to(hidden.dtype)])
    return joined.index_select(0, insertion.expand), insertion.layout


def read(backbone: Backbone, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The last layer, for what the head reads: what enters it -> [rows, n]."""
    states = backbone.read(hidden, batch.reads, batch.insertions[-1].layout)
    return pool_rows(states, batch.read_layout)


def first_tokens(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """States of every row's first token, before any prompt: [T, n] -> [rows, n]."""
    starts = torch.from_numpy(batch.layout.starts).to(hidden.device, non_blocking=True)
    return hidden.index_select(0, starts)
