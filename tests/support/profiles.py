"""Adapters with a profile of texts that they really answered, and texts unlike those."""

import random

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.profiles import profile_of

_WORDS = ("the", "a", "free", "win", "card", "my", "is", "not", "you", "call", "good", "bad")


def usual_texts(number: int, *, seed: int = 0) -> list[str]:
    """Three to eight words that the tiny backbones know; another seed gives other texts alike."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(3, 8))) for _ in range(number)]


def strange_texts(number: int) -> list[str]:
    """Long texts in a script of which no token is known."""
    return [
        f"東京 タワー {index} " + "は とても 高い " * (5 + index % 7) for index in range(number)
    ]


def profiled(adapter: Adapter, backbone: Backbone, texts: list[str]) -> Adapter:
    """The adapter, with the profile of these texts in its spec."""
    spec = adapter.spec
    encodings = [backbone.encoder.encode(text, max_length=spec.max_length) for text in texts]
    prepared = [prepare(adapter, backbone)]
    rows = []
    for encoding in encodings:
        batch = backbone.pack(rows_of(prepared, [(0, encoding)]))
        (answer,) = classify(backbone, batch, prepared)
        rows.append((answer.scores, encoding.input_ids))
    profile = profile_of(spec, rows, unknown_id=backbone.encoder.unknown_id, source="validation")
    return Adapter(spec.model_copy(update={"profile": profile}), adapter.tensors)
