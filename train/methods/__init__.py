"""The systems of the paper's tables, one file each, with the interface `method.Method`.

The recipe, the loop and everything above them import this. Start at `method.py`, then `idspam.py`.
"""

from collections.abc import Mapping

import torch

from adapters.backbone.model import Backbone
from train.methods.dept import Dept
from train.methods.fine_tuning import FineTuning
from train.methods.head_only import HeadOnly, MeanHeadOnly
from train.methods.idpg import Idpg
from train.methods.idspam import Idspam, IdspamVectors
from train.methods.lora import Lora
from train.methods.lpt import Lpt
from train.methods.method import Design, Method
from train.methods.p_tuning import PTuning
from train.methods.prompt_tuning import PromptTuning
from train.methods.smop import Smop
from train.methods.vectors import Vectors

METHODS: Mapping[str, type[Method]] = {
    "idspam": Idspam,
    "idspam+vectors": IdspamVectors,
    "idspam-paper": Idspam,
    "head-only": HeadOnly,
    "head-only-mean": MeanHeadOnly,
    "prompt-tuning": PromptTuning,
    "p-tuning": PTuning,
    "smop": Smop,
    "lpt": Lpt,
    "dept": Dept,
    "idpg": Idpg,
    "lora": Lora,
    "vectors": Vectors,
    "fine-tuning": FineTuning,
}


def build(
    name: str,
    backbone: Backbone,
    design: Design,
    labels: tuple[str, ...],
    random: torch.Generator,
) -> Method:
    """A method with its initial parameters."""
    return METHODS[name](backbone, design, labels, random)
