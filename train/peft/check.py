"""An imported adapter against PEFT's model: the same texts, the same tokens."""

from typing import Any

import numpy as np
import torch

from adapters.adapter import Float32, classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import Pooling
from adapters.packed.head import scores
from adapters.tokenizer import Encoding
from train.peft.saved import SavedModel

# Short and long, one and two texts, words and bytes.
_TEXTS: tuple[tuple[str, str | None], ...] = (
    ("ok", None),
    ("I was charged twice for the same transfer, and would like my money back.", None),
    ("naïve café — “quotes”, £5, 東京, 🙂", None),
    ("The plot is thin, but the two leads are so good together that one hardly minds. " * 3, None),
    ("Free entry in a weekly competition!", "Text WIN to 87121 now."),
)


# Of scores. Both sides compute in float32, where rounding makes about 1e-6.
MAX_DIFFERENCE = 1e-4


def check_scores(adapter: Adapter, backbone: Backbone, saved: SavedModel) -> float:
    """The largest difference of a score from the one that PEFT's model gives for the same tokens.

    All texts run here in one batch, and there alone.

    Raises:
        PeftError: it is larger than `MAX_DIFFERENCE`.
    """
    spec = adapter.spec
    length = min(128, spec.max_length)
    encodings = [backbone.encoder.encode(*text, max_length=length) for text in _TEXTS]
    prepared = [prepare(adapter, backbone)]
    batch = backbone.pack(rows_of(prepared, [(0, encoding) for encoding in encodings]))
    answers = classify(backbone, batch, prepared)
    differences = [
        np.abs(answer.scores - peft_scores(saved, encoding, adapter)).max()
        for answer, encoding in zip(answers, encodings, strict=True)
    ]
    largest = float(np.max(differences))
    if not largest <= MAX_DIFFERENCE:
        raise saved.folder.fault(
            f"scores here and in PEFT would differ by {largest:.2g}, and rounding explains at most "
            f"{MAX_DIFFERENCE:g}"
        )
    return largest


@torch.inference_mode()
def peft_scores(saved: SavedModel, encoding: Encoding, adapter: Adapter) -> Float32:
    """PEFT's scores for one text: [labels]."""
    ids, types = encoding.input_ids, encoding.token_type_ids
    if adapter.spec.head.pooling is Pooling.BEFORE_LAST:
        # The last token is the one that this service adds for causal backbones.
        ids, types = ids[:-1], types[:-1]
    tokens = torch.from_numpy(ids)[None]
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if saved.names.token_types:
        inputs["token_type_ids"] = torch.from_numpy(types)[None]
    result: Float32 = scores(saved.model(**inputs).logits, adapter.spec.activation)[0].numpy()
    return result
