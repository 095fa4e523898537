"""P-Tuning: a small network turns t free vectors into a prompt before the embeddings.

Source: Liu et al., "GPT Understands, Too", AI Open 2023, with PEFT's MLP encoder: two hidden
layers as wide as the backbone, each followed by ReLU. The network reads no text, so an adapter
holds only the prompt that it makes.
"""

import torch
from torch import Tensor

from adapters.backbone.model import Trunk
from adapters.format.spec import StaticPrompt
from adapters.packed.packing import PackedBatch
from train.methods.method import AdapterMethod, Design
from train.methods.prompt_tuning import PromptTuning

_LAYERS = 3


class PTuning(AdapterMethod):
    """`prompt.free`: [t, n]; `prompt.weights.i`, `prompt.biases.i`: three layers n -> n."""

    learning_rate = 1e-3

    def prompt_of(self, design: Design) -> StaticPrompt:
        return StaticPrompt(length=design.prompt_length)

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        n, shapes = self.backbone.hidden_size, self.spec.shapes()
        trained = {"prompt.free": shapes.pop("prompt.vectors")}
        for layer in range(_LAYERS):
            trained |= {f"prompt.weights.{layer}": (n, n), f"prompt.biases.{layer}": (n,)}
        return trained | shapes

    def initial_value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.startswith("prompt.biases"):
            return torch.zeros(shape)
        if name == "prompt.free":
            return torch.randn(shape, generator=self.random)
        return super().initial_value(name, shape)

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        return self._prompt().repeat(len(batch.rows), 1)

    def _prompt(self) -> Tensor:
        """[t, n]"""
        tensors = self.tensors
        states: Tensor = tensors["prompt.free"]
        for layer in range(_LAYERS):
            inputs = states if layer == 0 else torch.relu(states)
            weight, bias = tensors[f"prompt.weights.{layer}"], tensors[f"prompt.biases.{layer}"]
            states = torch.addmm(bias, inputs, weight)
        return states

    def folded(self) -> PromptTuning:
        random = torch.Generator()
        method = PromptTuning(self.backbone, self.design, self.labels, random)
        with torch.no_grad():
            prompt = self._prompt()
        kept = {name: self.snapshot()[name] for name in method.tensors if name in self.tensors}
        return method.restore({"prompt.vectors": prompt, **kept}).to(self.backbone.device)
