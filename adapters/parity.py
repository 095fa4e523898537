"""How far a narrower type moves a backbone's answers.

Knows no adapter that anyone trained: it makes its own.
"""

import torch

from adapters.backbone import Backbone
from adapters.packing import Row
from adapters.prompt import GeneratorWeights
from adapters.spec import AdapterSpec

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
    spec, generator = _probe(backbone)
    length = min(128, backbone.max_tokens)
    rows = [Row(backbone.encoder.encode(text, max_length=length), spec, 0) for text in _TEXTS]
    batch = backbone.pack(rows)
    return backbone.forward(batch, {0: generator}).states.float()


def _probe(backbone: Backbone) -> tuple[AdapterSpec, GeneratorWeights]:
    n, t, c = backbone.hidden_size, 10, 16
    spec = AdapterSpec(
        backbone=backbone.identity,
        tokenizer_sha256=backbone.encoder.sha256,
        hidden_size=n,
        prompt_length=t,
        bottleneck=c,
        attention_size=n,
        insertion_layer=backbone.layers // 2,
        labels=("a", "b"),
        max_length=2,
    )
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=random) * shape[0] ** -0.5).to(backbone.device)
        for name, shape in spec.shapes().items()
    }
    return spec, GeneratorWeights.of(spec, tensors).folded()
