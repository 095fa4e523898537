"""An adapter's tensors as parameters, and how they start. The equation is `adapters.prompt`."""

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter
from adapters.head import HeadWeights
from adapters.prompt import GeneratorWeights
from adapters.spec import AdapterSpec


class AdapterModule(nn.Module):
    """Parameters named and shaped as `AdapterSpec.shapes` declares them, in float32.

    Matrices start at N(0, 1/fan_in), biases at zero. The head starts at zero, so that the first
    prediction is uniform whatever the number of labels.
    """

    def __init__(self, spec: AdapterSpec, *, generator: torch.Generator) -> None:
        super().__init__()
        self.spec = spec
        self._names = tuple(spec.shapes())
        for name, shape in spec.shapes().items():
            self.register_parameter(_key(name), nn.Parameter(_initial(name, shape, generator)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters themselves, under the file format's names."""
        return {name: self.get_parameter(_key(name)) for name in self._names}

    @property
    def generator(self) -> GeneratorWeights:
        return GeneratorWeights.of(self.spec, self.tensors)

    @property
    def head(self) -> HeadWeights:
        return HeadWeights.of(self.tensors)

    def snapshot(self) -> dict[str, Tensor]:
        """A detached copy of every tensor, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> Self:
        """Put back what `snapshot` gave."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(tensors[name])
        return self

    def adapter(self, spec: AdapterSpec, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """These weights as an adapter of `spec`, which may add provenance and calibration to this
        module's own."""
        assert spec.shapes() == self.spec.shapes()
        return Adapter(spec, {name: tensor.to(dtype) for name, tensor in self.snapshot().items()})


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("bias") or name == "head.out.weight":
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[0])


def _key(name: str) -> str:
    return name.replace(".", "_")
