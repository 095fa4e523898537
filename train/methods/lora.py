"""LoRA with PEFT: r = 8 on queries and values, as its authors use it on RoBERTa.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. PEFT inserts
its layers into the backbone, which runs packed batches as for every other method.
"""

from typing import Any

import torch
from torch import Tensor

from adapters.backbone.model import Backbone, Trunk
from adapters.packed.packing import PackedBatch
from train.errors import SettingsError
from train.methods.method import Baseline, read

RANK, ALPHA, DROPOUT = 8, 16, 0.1

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "electra": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
}


class Lora(Baseline):
    """`model`: the backbone's, with PEFT's matrices.

    Raises:
        SettingsError: PEFT is not installed.
    """

    learning_rate = 1e-3
    changes_backbone = True

    def add_parameters(self) -> None:
        super().add_parameters()
        try:
            import peft
        except ImportError:
            raise SettingsError(["the method lora needs the package peft"]) from None
        config: Any = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
            target_modules=TARGETS[self.backbone.model_type],
            fan_in_fan_out=self.backbone.model_type == "gpt2",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.random)))
            self.model = peft.inject_adapter_in_model(config, self.backbone.editable_model())
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # PEFT creates them in the backbone's type; bfloat16 would round small steps away.
                parameter.data = parameter.data.float()

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        return unfrozen_states(self.backbone, batch)


def unfrozen_states(backbone: Backbone, batch: PackedBatch) -> Tensor:
    """The states that the head reads, with gradients through every layer: [rows, n]."""
    hidden = backbone.embed(batch.input_ids, batch.token_type_ids, batch.offsets)
    return read(backbone, backbone.run_layers(hidden, 0, backbone.layers - 1, batch.layout), batch)
