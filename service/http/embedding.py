"""Vectors of texts, whatever protocol asks: tokenise, submit, normalise."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from starlette.requests import Request

from adapters.format.spec import embedding_spec
from adapters.tokenizer import Encoding, End
from service.engine.interface import EMBEDDING, Entry, cost_of
from service.errors import InvalidRequest, NoInputs, TooLarge
from service.http.answer_size import refuse_above
from service.http.classify import Counted, read_texts, submit
from service.http.lifecycle import service_of
from service.http.texts import Text

# `-0.012345678,`, or `-1.2345678e-05,`
VALUE_BYTES = 15
# Four bytes are six characters in base 64.
BASE64_BYTES = 6
Vector: TypeAlias = npt.NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Embeddings(Counted):
    """vectors: float32 [dimensions] for every text. Seconds are those of the slowest text."""

    vectors: Sequence[Vector]
    encodings: Sequence[Encoding]
    tokenize_seconds: float
    queue_seconds: float
    inference_seconds: float


async def embed(
    request: Request,
    texts: Sequence[str],
    *,
    deadline: float,
    cut: End | Literal["nothing"],
    normalize: bool = True,
    dimensions: int | None = None,
    value_bytes: int = VALUE_BYTES,
    place: str,
) -> Embeddings:
    """The mean of the backbone's last states of every text, without any adapter.

    Args:
        deadline, cut: as of `classify`.
        normalize: to length one.
        dimensions: only so many, the first ones, and these to length one.
        value_bytes: of one value in the answer.
        place: what the protocol calls the list of texts, for faults.

    Raises:
        NoInputs, TooLarge: no texts, more than there may be, or the answer would be too large.
        InvalidRequest: more dimensions than the backbone has, or a text is too long.
        ServiceError: as `Predictor.predict`.
    """
    service = service_of(request)
    settings, info = service.settings, service.engine.info
    if not texts:
        raise NoInputs
    if len(texts) > settings.max_inputs:
        raise TooLarge(f"{len(texts)} {place}, at most {settings.max_inputs} are allowed")
    if dimensions is not None and dimensions > info.hidden_size:
        raise InvalidRequest([f"dimensions: {dimensions}, the backbone has {info.hidden_size}"])
    refuse_above(
        len(texts) * (dimensions or info.hidden_size) * value_bytes,
        settings.max_answer_bytes,
        "send fewer inputs",
    )
    spec = embedding_spec(
        info.identity,
        info.encoder.sha256,
        hidden_size=info.hidden_size,
        max_tokens=info.max_tokens,
    )
    rows = [
        Text(text, None, EMBEDDING, spec, f"{place}.{index}") for index, text in enumerate(texts)
    ]
    started = perf_counter()
    encodings = await read_texts(request, rows, deadline=deadline, cut=cut)
    seconds = perf_counter() - started
    entries = [
        Entry(EMBEDDING, encoding, cost_of(encoding, spec), counted=False) for encoding in encodings
    ]
    completion = await submit(request, entries, deadline=deadline)
    found = Embeddings(
        [_shortened(row.scores, dimensions, normalize=normalize) for row in completion.rows],
        encodings,
        seconds,
        completion.queue_seconds,
        completion.inference_seconds,
    )
    service.tracing.classified(
        tokenize=seconds,
        queue=found.queue_seconds,
        inference=found.inference_seconds,
        texts=len(texts),
        tokens=found.tokens,
        adapters=0,
    )
    service.guard.charge(found.tokens)
    return found


def _shortened(vector: Vector, dimensions: int | None, *, normalize: bool) -> Vector:
    part: Any = vector if dimensions is None else vector[:dimensions]
    if not normalize:
        return np.ascontiguousarray(part)
    # As in PyTorch: a vector of zeros stays one.
    length = max(float(np.linalg.norm(part)), 1e-12)
    shortened: Vector = (part / np.float32(length)).astype(np.float32)
    return shortened
