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
from adapters.format.files import Adapter
from adapters.format.spec import (
    AdapterSpec,
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    Head,
    HeadKind,
    Pooling,
    Prompt,
    Site,
    Tuning,
    VectorTuning,
)
from adapters.layers.tuning import BackboneTuning
from adapters.packed.head import HeadWeights, logits
from adapters.packed.layout import Layout, pool_rows
from adapters.packed.packing import PackedBatch, RowShape
from adapters.packed.tuning import UniformTuning, tuning_weights
from train.objective import OBJECTIVES, Activation, Objective

# AdamW's weight decay of a tuning and its head beside a prompt, which has its own.
TUNING_DECAY = 0.01


@dataclass(frozen=True, slots=True)
class Design:
    """How a method is built, nothing left open.

    activation: softmax for one label a text, sigmoid for a set of them. dropout: of
    what the head reads. hidden_dropout: of what each layer adds to the states. tuned_layers: the
    first one and the one after the last; None: all of them. rank, scaling, sites: of LoRA.

    A method uses those that it has.
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
    hidden_dropout: float = 0.0
    tuned_layers: tuple[int, int] | None = None
    rank: int = 8
    scaling: float = 2.0
    sites: tuple[Site, ...] = (Site.QUERY, Site.VALUE)


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
    # The peak learning rate of the changes to the layers; None: the same.
    tuning_rate: ClassVar[float | None] = None
    # Both rates, in this order, for data with many labels (`train.config.recipe.MANY_LABELS`), if
    # they are others there.
    many_labels_rates: ClassVar[tuple[float, float] | None] = None
    # Why no adapter file holds what it trains; None if one does.
    not_an_adapter: ClassVar[str | None] = None
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

    def decay(self, name: str) -> float | None:
        """The weight decay of one of `tensors`; None: the run's."""
        return None

    def groups(self, rate: float, *, tuning_rate: float | None = None) -> list[dict[str, Any]]:
        """The trained parameters as an optimiser's groups, one per learning rate and weight decay.

        The bias of a head for sets of labels says how frequent they are: it does not decay.

        Args:
            tuning_rate: of the changes to the layers; None: `rate`.
        """
        bias = self.head.out_bias if self.design.activation == "sigmoid" else None
        tuned = 1.0 if tuning_rate is None else tuning_rate / rate
        groups: dict[tuple[float, float | None], list[nn.Parameter]] = {}
        for name, tensor in self.tensors.items():
            factor = self.rate_factor(name) * (tuned if name.startswith("tuning.") else 1.0)
            decay = 0.0 if tensor is bias else self.decay(name)
            groups.setdefault((factor, decay), []).append(tensor)
        return [
            {"params": tensors, "lr": rate * factor, "factor": factor}
            | ({} if decay is None else {"weight_decay": decay})
            for (factor, decay), tensors in groups.items()
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


class AdapterMethod(Method):
    """A method whose parameters are an adapter: a prompt, a tuning of the layers and a head.

    They have the names and shapes of `AdapterSpec.shapes`, in float32. Matrices start from
    N(0, 1/fan_in), biases from zero. The last layer of the head starts at zero, so that the first
    prediction is uniform for any number of labels.
    """

    def prompt_of(self, design: Design) -> Prompt | None:
        """The prompt that it trains, if any."""
        return None

    def tuning_of(self, design: Design) -> Tuning | None:
        """The tuning that it trains, if any."""
        return None

    def head_of(self, design: Design) -> Head:
        """The head that it trains."""
        return Head(kind=design.head, pooling=design.pooling)

    def add_parameters(self) -> None:
        self.spec = AdapterSpec(
            backbone=self.backbone.identity,
            tokenizer_sha256=self.backbone.encoder.sha256,
            hidden_size=self.backbone.hidden_size,
            prompt=self.prompt_of(self.design),
            tuning=self.tuning_of(self.design),
            head=self.head_of(self.design),
            activation=self.design.activation,
            labels=self.labels,
            max_length=self.design.max_length,
        )
        self._tensors = {
            name: nn.Parameter(self.initial_value(name, shape))
            for name, shape in self.trained_shapes().items()
        }
        for name, parameter in self._tensors.items():
            self.register_parameter(name.replace(".", "_"), parameter)
        if isinstance(self.spec.tuning, VectorTuning):
            self._tensors["tuning.bias"].register_hook(self._without_bias_of_keys)

    def _without_bias_of_keys(self, gradient: Tensor) -> Tensor:
        # It cancels in the softmax, so its gradient is rounding noise, of which AdamW would make
        # steps of full size.
        n = self.backbone.hidden_size
        gradient = gradient.clone()
        gradient[:, n : 2 * n] = 0.0
        return gradient

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return self.spec.shapes()

    def initial_value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The start of one of `tensors`."""
        if name.startswith("tuning."):
            # As in PEFT: LoRA's A from a uniform distribution, everything else at zero.
            bound = shape[1] ** -0.5 if name.endswith(".a") else 0.0
            return torch.empty(shape).uniform_(-bound, bound, generator=self.random)
        if name.endswith("bias") or name == "head.out.weight":
            return torch.zeros(shape)
        return torch.randn(shape, generator=self.random) / math.sqrt(shape[0])

    @property
    def shape(self) -> RowShape:
        return RowShape.of(self.spec)

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        return self._tensors

    @property
    def head(self) -> HeadWeights:
        return HeadWeights.of({**self.tensors})

    @property
    def trunk_layers(self) -> int:
        prompt, tuning = self.spec.prompt, self.spec.tuning
        reached = [prompt.layer] if prompt is not None else []
        reached += [tuning.layers[0]] if tuning is not None else []
        return min(reached, default=self.backbone.layers)

    def decay(self, name: str) -> float | None:
        # The run's is for the prompt, where there is one: a generator quickly memorises small data.
        both = self.spec.prompt is not None and self.spec.tuning is not None
        return TUNING_DECAY if both and not name.startswith(("generator.", "prompt.")) else None

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        """[rows * t, n], row by row in the batch's order. trunk: at the insertion layer.

        Methods with a prompt have their own.
        """
        raise AssertionError(f"{type(self).__name__} has no prompt")

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        backbone, tuning = self.backbone, self._tuning()
        hidden, layout, layer = trunk.hidden, batch.layout, trunk.layer
        if layer == backbone.layers:
            last = backbone.final_norm(hidden.index_select(0, batch.reads))
            return pool_rows(last, batch.read_layout)
        if (prompt := self.spec.prompt) is not None:
            hidden = backbone.run_layers(hidden, layer, prompt.layer, layout, tuning)
            layer = prompt.layer
            prompts = self.prompts(Trunk(layer, hidden, trunk.embeddings), batch)
            hidden, layout = inserted(hidden, prompts, batch)
        hidden = backbone.run_layers(hidden, layer, backbone.layers - 1, layout, tuning)
        return read(backbone, hidden, batch, tuning)

    def _tuning(self) -> BackboneTuning | None:
        design, tuning = self.design, self.spec.tuning
        dropout, hidden = (design.dropout, design.hidden_dropout) if self.training else (0.0, 0.0)
        if tuning is None and not hidden:
            return None
        weights = None if tuning is None else tuning_weights(tuning, {**self.tensors})
        return UniformTuning(weights, dropout=dropout, hidden_dropout=hidden)

    def folded(self) -> "AdapterMethod":
        """A method with the same answers whose parameters are the adapter's tensors; mostly itself.

        For methods that train more than an adapter holds.
        """
        return self

    def adapter(self, spec: AdapterSpec, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """These weights as an adapter. spec: the method's, with or without provenance."""
        assert spec.shapes() == self.spec.shapes()
        return Adapter(spec, {name: tensor.to(dtype) for name, tensor in self.snapshot().items()})


class Baseline(Method):
    """A method that is no adapter, with the class head of one, which starts at zero."""

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


def inserted(hidden: Tensor, prompts: Tensor, batch: PackedBatch) -> tuple[Tensor, Layout]:
    """Insert prompts before their rows: [T, n] and [rows * t, n] -> [T + rows * t, n]."""
    insertion = batch.insertions[0]
    joined = torch.cat([hidden, prompts.to(hidden.dtype)])
    expanded: Tensor = _Reordered.apply(joined, insertion.expand)  # type: ignore[no-untyped-call]
    return expanded, insertion.layout


class _Reordered(torch.autograd.Function):
    """Rows in another order, each once. Autograd would add up their gradients in zeros."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return states.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(gradient).index_copy_(0, order, gradient), None


def read(
    backbone: Backbone, hidden: Tensor, batch: PackedBatch, tuning: BackboneTuning | None = None
) -> Tensor:
    """Run the last layer for the positions that the head reads: its input -> [rows, n]."""
    states = backbone.read(hidden, batch.reads, batch.final_layout, tuning)
    return pool_rows(states, batch.read_layout)


def first_tokens(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """States of every row's first token, without prompts inserted: [T, n] -> [rows, n]."""
    return hidden.index_select(0, batch.layout.cumulative[:-1])
