"""AdamW over a method's parameters, and clipping of their gradients."""

import torch
from torch import Tensor

from train.config.recipe import Recipe
from train.methods.method import Method

# The paper's values.
BETAS = (0.9, 0.98)
EPSILON = 1e-6
CLIP_NORM = 1.0


class Optimizer:
    """The optimiser of a run.

    On a CUDA device the learning rates are there too: a captured step reads them like its texts.
    """

    def __init__(self, method: Method, recipe: Recipe) -> None:
        # Looking up a module's parameters takes as long as a small matrix product.
        self.tensors = method.tensors
        self._recipe = recipe
        device = method.backbone.device
        on_cuda = device.type == "cuda"
        self.adamw = torch.optim.AdamW(
            method.groups(recipe.learning_rate, tuning_rate=recipe.tuning_rate),
            lr=recipe.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=recipe.weight_decay,
            fused=True,
            capturable=on_cuda,
        )
        groups = self.adamw.param_groups
        self._factors = torch.tensor([group["factor"] for group in groups], dtype=torch.float64)
        self._rates: Tensor | None = None
        if on_cuda:
            self._rates = torch.zeros(len(groups), device=device)
            for group, rate in zip(groups, self._rates.unbind(), strict=True):
                group["lr"] = rate

    def rates_at(self, share: float) -> Tensor:
        """The groups' learning rates at a share of the peak, on the host: float64 [groups]."""
        return self._recipe.learning_rate * share * self._factors

    def set_rates(self, rates: Tensor) -> None:
        """Those of the next step.

        Args:
            rates: of `rates_at`, on the host or on the device of the parameters.
        """
        if self._rates is not None:
            self._rates.copy_(rates, non_blocking=True)
            return
        for group, rate in zip(self.adamw.param_groups, rates.tolist(), strict=True):
            group["lr"] = rate

    def zero_grad(self) -> None:
        self.adamw.zero_grad()

    def step(self) -> None:
        """Clip the gradients, and change the parameters."""
        torch.nn.utils.clip_grad_norm_(self.tensors.values(), CLIP_NORM)
        self.adamw.step()
