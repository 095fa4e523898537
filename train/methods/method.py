"""The interface of every system in a comparison: parameters, and logits for a packed batch.

Everything else - data, order, budget, class head, selection - is the same for all methods, so that
a comparison compares the methods alone.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.backbone.model import Backbone, Trunk
from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    Head,
    HeadKind,
    Pooling,
)
from adapters.packed.head import HeadWeights, logits
from adapters.packed.layout import Layout, pool_rows
from adapters.packed.packing import PackedBatch, RowShape
from train.objective import OBJECTIVES, Activation, Objective


@dataclass(frozen=True, slots=True)
class Design:
    """How a method is built, nothing left open.

    activation: softmax for one label a text, sigmoid for a set of them.

    Baselines use those that they have: prompt length, layer, pooling and head.
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
    activation: Activation = "softmax"

    def spec(self, backbone: Backbone, labels: tuple[str, ...]) -> AdapterSpec:
        """The spec of an adapter of this backbone for these labels."""
        return AdapterSpec(
            backbone=backbone.identity,
            tokenizer_sha256=backbone.encoder.sha256,
            hidden_size=backbone.hidden_size,
            prompt=AttentionPrompt(
                length=self.prompt_length,
                layer=self.insertion_layer,
                source=self.generator_input,
                pooling=self.generator_pooling,
                bottleneck=self.bottleneck,
                attention_size=self.attention_size,
                final_activation=self.final_activation,
            ),
            head=Head(kind=self.head, pooling=self.pooling),
            activation=self.activation,
            labels=labels,
            max_length=self.max_length,
        )


class Method(nn.Module, ABC):
    """One system under training.

    Args:
        backbone: frozen, unless the method `changes_backbone`.
        design: its switches; a method reads those that it has.
        random: draws the initial values.
    """

    # AdamW's peak learning rate and weight decay if the settings have none; None: the preset's.
    # docs/research.md says how they were chosen.
    learning_rate: ClassVar[float | None]
    weight_decay: ClassVar[float | None] = 0.01
    # Whether training changes the backbone itself, so that nothing else can use it afterwards.
    changes_backbone: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Backbone,
        design: Design,
        labels: tuple[str, ...],
        random: torch.Generator,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.design = design
        self.labels = labels
        self.random = random
        self.add_parameters()

    @abstractmethod
    def add_parameters(self) -> None:
        """Create the trained parameters, with their initial values drawn from `random`."""

    @property
    @abstractmethod
    def shape(self) -> RowShape:
        """How its rows are packed."""

    @property
    @abstractmethod
    def head(self) -> HeadWeights:
        """The class head."""

    @property
    def trunk_layers(self) -> int:
        """Number of lowest layers that no parameter reaches: their states never change."""
        return self.shape.insertion_layer

    @abstractmethod
    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        """The states that the head reads, one per row: [rows, n], in the batch's order.

        Args:
            trunk: the batch's states after `trunk_layers` layers, without gradients.
        """

    def forward(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        """Logits, float32 [rows, labels], in the batch's order."""
        states = self.states(batch, trunk).float()
        if self.training and self.design.dropout:
            states = functional.dropout(states, self.design.dropout)
        return logits(states, self.head)

    @property
    def objective(self) -> Objective:
        """What is asked of its logits."""
        return OBJECTIVES[self.design.activation]

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def rate_factor(self, name: str) -> float:
        """The factor of the learning rate for one of `tensors`."""
        return 1.0

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The trained parameters as an optimiser's groups, one per factor of the learning rate.

        The bias of a head for sets of labels says how frequent they are: it does not decay.
        """
        bias = self.head.out_bias if self.design.activation == "sigmoid" else None
        by_factor: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, tensor in self.tensors.items():
            by_factor.setdefault((self.rate_factor(name), tensor is bias), []).append(tensor)
        return [
            {"params": tensors, "lr": rate * factor, "factor": factor}
            | ({"weight_decay": 0.0} if is_bias else {})
            for (factor, is_bias), tensors in by_factor.items()
        ]

    @property
    def size(self) -> int:
        """Number of trained parameters, including the class head."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def snapshot(self) -> dict[str, Tensor]:
        """A detached copy of every trained tensor, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> Self:
        """Copy tensors as returned by `snapshot` back into the parameters."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(tensors[name])
        return self


class Baseline(Method):
    """A method other than ID-SPAM, with the class head of an adapter, which starts at zero."""

    def add_parameters(self) -> None:
        n = self.backbone.hidden_size
        if self.design.head is HeadKind.MLP:
            self.head_dense = self.normal((n, n), fan_in=n)
            self.head_dense_bias = nn.Parameter(torch.zeros(n))
        self.head_out = nn.Parameter(torch.zeros(n, len(self.labels)))
        self.head_bias = nn.Parameter(torch.zeros(len(self.labels)))

    @property
    def head(self) -> HeadWeights:
        return HeadWeights(
            getattr(self, "head_dense", None),
            getattr(self, "head_dense_bias", None),
            self.head_out,
            self.head_bias,
        )

    @property
    def shape(self) -> RowShape:
        return RowShape(pooling=self.design.pooling)

    def normal(self, shape: tuple[int, ...], *, fan_in: int) -> nn.Parameter:
        """Drawn from N(0, 1 / fan_in)."""
        return nn.Parameter(torch.randn(shape, generator=self.random) / math.sqrt(fan_in))


class PromptBaseline(Baseline):
    """A baseline that inserts soft prompts before its rows at one layer, as ID-SPAM does."""

    @abstractmethod
    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        """[rows * t, n], row by row in the batch's order. trunk: at the insertion layer."""

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        hidden, layout = inserted(trunk.hidden, self.prompts(trunk, batch), batch)
        first, last = self.shape.insertion_layer, self.backbone.layers - 1
        return read(self.backbone, self.backbone.run_layers(hidden, first, last, layout), batch)


def inserted(hidden: Tensor, prompts: Tensor, batch: PackedBatch) -> tuple[Tensor, Layout]:
    """Insert prompts before their rows: [T, n] and [rows * t, n] -> [T + rows * t, n]."""
    insertion = batch.insertions[0]
    joined = torch.cat([hidden, prompts.to(hidden.dtype)])
    return joined.index_select(0, insertion.expand), insertion.layout


def read(backbone: Backbone, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Run the last layer for the positions that the head reads: its input -> [rows, n]."""
    states = backbone.read(hidden, batch.reads, batch.final_layout)
    return pool_rows(states, batch.read_layout)


def first_tokens(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """States of every row's first token, without prompts inserted: [T, n] -> [rows, n]."""
    starts = torch.from_numpy(batch.layout.starts).to(hidden.device, non_blocking=True)
    return hidden.index_select(0, starts)
