"""Texts to answers, whatever protocol they came in. Knows no protocol's JSON and no device.

Text -> tokens -> engine -> Answers
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from starlette.requests import Request

from adapters.backbone.tokenizer import Encoding, End, TextEncoder
from adapters.format.spec import AdapterSpec
from service.engine.interface import AdapterKey, Completion, Entry, RowResult, cost_of
from service.engine.observer import Observer
from service.errors import AdapterLoadFailed, InferenceFailed, InvalidRequest
from service.http.connection import while_connected
from service.http.errors import MAX_DETAILS
from service.http.lifecycle import Service, service_of

# Below this many characters tokenizing takes less time than handing it to a thread and back.
INLINE_CHARACTERS = 2000
_UNCUT = 2**31 - 1


# Not frozen, as everything that is made for every text: a frozen one takes four times as long.
@dataclass(slots=True, eq=False)
class Text:
    """One input, its adapter found. place: where it stands in the caller's request, for faults."""

    text: str
    text_pair: str | None
    key: AdapterKey
    spec: AdapterSpec
    place: str


@dataclass(slots=True, eq=False)
class Answers:
    """What came of a request's texts, in their order. best: each text's best label."""

    texts: Sequence[Text]
    encodings: Sequence[Encoding]
    completion: Completion
    best: Sequence[str]
    tokenize_seconds: float

    @property
    def rows(self) -> Sequence[RowResult]:
        return self.completion.rows

    @property
    def truncated(self) -> int:
        """Texts that were cut to their adapter's maximum length."""
        return sum(encoding.truncated for encoding in self.encodings)


async def classify(
    request: Request,
    texts: Sequence[Text],
    *,
    deadline: float,
    cut: End | Literal["nothing"] = "tail",
    explain: bool = False,
) -> Answers:
    """Classify texts, each by its own adapter; all of them or none.

    Args:
        request: given up when its client goes away; its body must have been read.
        deadline: on the clock of `time.monotonic`.
        cut: the end of too long a text that is not read; `nothing` refuses such a text.
        explain: rows get their token weights.

    Raises:
        InvalidRequest: texts that are too long while nothing may be cut.
        ServiceError: as `Predictor.predict`.
        UnknownAdapter, UnknownRevision: deleted since it was resolved.
        ClientDisconnect: nobody waits for the answer any more.
    """
    service = service_of(request)
    end: End = "tail" if cut == "nothing" else cut
    encodings, seconds = await _encode(service.encoder, texts, end, service.metrics)
    if cut == "nothing":
        await _refuse_truncated(service.encoder, texts, encodings)
    entries = [
        Entry(text.key, encoding, cost_of(encoding, text.spec), explain)
        for text, encoding in zip(texts, encodings, strict=True)
    ]
    try:
        answering = _answer(service, entries, deadline=deadline)
        completion = await while_connected(request, answering)
    except (AdapterLoadFailed, InferenceFailed) as error:
        _count_failed(error, entries, service.metrics)
        raise
    service.tracing.classified(
        tokenize=seconds,
        queue=completion.queue_seconds,
        inference=completion.inference_seconds,
        texts=len(texts),
        tokens=sum(map(len, encodings)),
        adapters=len({text.key for text in texts}),
    )
    best = [
        text.spec.labels[row.scores.argmax()]
        for text, row in zip(texts, completion.rows, strict=True)
    ]
    counts = Counter(zip((text.key.name for text in texts), best, strict=True))
    for (name, label), count in counts.items():
        service.metrics.predicted(name, label, count)
    return Answers(texts, encodings, completion, best, seconds)


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices of labels, the best first; of equal scores the earlier label, as its spec has it."""
    # Stable, as its reverse is.
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


async def _encode(
    encoder: TextEncoder, texts: Sequence[Text], cut: End, metrics: Observer
) -> tuple[list[Encoding], float]:
    """Encodings in the texts' order, and the seconds that it took."""
    started = perf_counter()
    characters = sum(len(item.text) + len(item.text_pair or "") for item in texts)
    if characters < INLINE_CHARACTERS:
        encodings = [
            encoder.encode(item.text, item.text_pair, max_length=item.spec.max_length, cut=cut)
            for item in texts
        ]
    else:
        encodings = await asyncio.to_thread(_encode_many, encoder, texts, cut)
    seconds = perf_counter() - started
    metrics.tokenized(seconds, truncated=sum(encoding.truncated for encoding in encodings))
    return encodings, seconds


def _encode_many(encoder: TextEncoder, texts: Sequence[Text], cut: End) -> list[Encoding]:
    lengths = [item.spec.max_length for item in texts]
    found: dict[int, Encoding] = {}
    for length in set(lengths):
        mine = [index for index, item in enumerate(lengths) if item == length]
        pairs = [(texts[index].text, texts[index].text_pair) for index in mine]
        encodings = encoder.encode_batch(pairs, max_length=length, cut=cut)
        found.update(zip(mine, encodings, strict=True))
    return [found[index] for index in range(len(texts))]


async def _refuse_truncated(
    encoder: TextEncoder, texts: Sequence[Text], encodings: Sequence[Encoding]
) -> None:
    """
    Raises:
        InvalidRequest: naming each input that is too long, with its number of tokens and its
        adapter's limit.
    """
    cut = [index for index, encoding in enumerate(encodings) if encoding.truncated][:MAX_DETAILS]
    if not cut:
        return
    pairs = [(texts[index].text, texts[index].text_pair) for index in cut]
    whole = await asyncio.to_thread(encoder.encode_batch, pairs, max_length=_UNCUT)
    raise InvalidRequest(
        [
            f"{texts[index].place}: {len(encoding)} tokens, adapter {texts[index].key.name!r} "
            f"reads {texts[index].spec.max_length} and truncate is false"
            for index, encoding in zip(cut, whole, strict=True)
        ]
    )


async def _answer(service: Service, entries: Sequence[Entry], *, deadline: float) -> Completion:
    try:
        return await service.engine.predict(entries, deadline=deadline)
    except AdapterLoadFailed as error:
        # Deleted since its name was resolved? That is the answer then, once the deletion is done.
        # Put back meanwhile? It will load now; a file that is really lost fails again.
        await service.catalog.settled(error.name)
        service.catalog.resolve(f"{error.name}@{error.revision}")
    return await service.engine.predict(entries, deadline=deadline)


def _count_failed(
    error: AdapterLoadFailed | InferenceFailed, entries: Sequence[Entry], metrics: Observer
) -> None:
    # One adapter that cannot be loaded says nothing of the others in its request.
    counts = Counter(
        entry.adapter.name
        for entry in entries
        if isinstance(error, InferenceFailed) or entry.adapter.name == error.name
    )
    for name, count in counts.items():
        metrics.adapter_failed(name, count)


def timings_ms(answers: Answers) -> Mapping[str, float]:
    """Milliseconds of each stage; of queue and inference those of the slowest text."""
    return {
        "tokenize": round(answers.tokenize_seconds * 1000, 3),
        "queue": round(answers.completion.queue_seconds * 1000, 3),
        "inference": round(answers.completion.inference_seconds * 1000, 3),
    }
