"""Fine-tuning: every weight of the backbone, kept in float32."""

import torch
from torch import Tensor

from adapters.backbone.model import Trunk
from adapters.packed.packing import PackedBatch
from train.methods.method import Baseline, read


class FineTuning(Baseline):
    """`model`: the backbone's, trained. It computes in the backbone's type, but its weights are
    float32: bfloat16 would round small steps away."""

    learning_rate = 5e-5
    changes_backbone = True
    not_an_adapter = "it changes the backbone, which all adapters share"

    def add_parameters(self) -> None:
        super().add_parameters()
        self._computes = self.backbone.dtype
        self.model = self.backbone.to(dtype=torch.float32).editable_model().requires_grad_(True)

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        narrow = self._computes != torch.float32
        with torch.autocast(self.backbone.device.type, self._computes, enabled=narrow):
            backbone, last = self.backbone, self.backbone.layers - 1
            hidden = backbone.embed(batch.input_ids, batch.token_type_ids, batch.offsets)
            return read(backbone, backbone.run_layers(hidden, 0, last, batch.layout), batch)

    def rate_factor(self, name: str) -> float:
        # The head is not pretrained: it starts at zero.
        return 20.0 if name.startswith("head") else 1.0
