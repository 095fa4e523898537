"""How far a narrower type moves a backbone's answers.

Knows no adapter that anyone trained: it makes its own.
"""

import torch

from adapters.adapter import prepare, random_adapter, rows_of
from adapters.backbone import Backbone

_TEXTS = (
    "",
    "ok",
    "Free entry in a weekly competition to win tickets, text WIN to 87121 now!",
    "I was charged twice for the same transfer and would like to know how to get my money back.",
    "The plot is thin, but the two leads are so good together that one hardly minds. " * 6,
)


def answer_error(backbone: Backbone, dtype: torch.dtype) -> float:
    """Largest ||narrow - exact|| / ||exact|| of the answers to a few texts with a seeded adapter.

    The backbone's weights come back as they were: the cast is tried on each, then undone from a
    copy.
    """
    exact = _answers(backbone)
    kept = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    backbone.to(dtype=dtype)
    narrow = _answers(backbone)
    backbone.to(dtype=torch.float32)
    backbone.load_state_dict(kept)
    return float(((narrow - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@torch.inference_mode()
def _answers(backbone: Backbone) -> torch.Tensor:
    adapter = prepare(random_adapter(backbone), backbone)
    length = min(128, backbone.max_tokens)
    rows = rows_of(
        [adapter], [(0, backbone.encoder.encode(text, max_length=length)) for text in _TEXTS]
    )
    return backbone.forward(backbone.pack(rows), {0: adapter.generator}).states.float()
