"""ID-SPAM: the method that this project serves.

Its equation is in `adapters.packed.prompt`, which serving runs too. Source: Muppidi, Nandy,
Bandyopadhyay, ACL 2025 (arXiv 2506.05629); `--preset paper` sets the adapter spec's switches as in
the paper.
"""

import math

import torch
from torch import Tensor, nn

from adapters.backbone.model import Trunk
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec, AttentionPrompt, GeneratorInput
from adapters.packed.head import HeadWeights
from adapters.packed.packing import PackedBatch, RowShape
from adapters.packed.prompt import GeneratorWeights, generate
from train.methods.method import Method, inserted, read


class Idspam(Method):
    """Its parameters have the names and shapes of `AdapterSpec.shapes`, in float32.

    Matrices start from N(0, 1/fan_in), biases from zero. The last layer of the head starts at zero,
    so that the first prediction is uniform for any number of labels.
    """

    learning_rate = None
    weight_decay = None

    def add_parameters(self) -> None:
        self.spec = self.design.spec(self.backbone, self.labels)
        assert isinstance(self.spec.prompt, AttentionPrompt)
        self.prompt = self.spec.prompt
        self._tensors = {
            name: nn.Parameter(_initial_value(name, shape, self.random))
            for name, shape in self.spec.shapes().items()
        }
        for name, parameter in self._tensors.items():
            self.register_parameter(name.replace(".", "_"), parameter)

    @property
    def shape(self) -> RowShape:
        return RowShape.of(self.spec)

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        return self._tensors

    @property
    def head(self) -> HeadWeights:
        return HeadWeights.of({**self.tensors})

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        embeddings = self.prompt.source is GeneratorInput.EMBEDDINGS
        source = trunk.embeddings if embeddings else trunk.hidden
        assert source is not None, "a trunk for prompts from embeddings holds them"
        weights = {0: GeneratorWeights.of(self.prompt, {**self.tensors})}
        prompts, _ = generate(source, batch.insertions[0].generations[0], weights)
        hidden, layout = inserted(trunk.hidden, prompts, batch)
        first, last = self.prompt.layer, self.backbone.layers - 1
        return read(self.backbone, self.backbone.run_layers(hidden, first, last, layout), batch)

    def adapter(self, spec: AdapterSpec, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """These weights as an adapter. spec: the method's, with or without provenance."""
        assert spec.shapes() == self.spec.shapes()
        return Adapter(spec, {name: tensor.to(dtype) for name, tensor in self.snapshot().items()})


def _initial_value(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    if name.endswith("bias") or name == "head.out.weight":
        return torch.zeros(shape)
    return torch.randn(shape, generator=random) / math.sqrt(shape[0])
