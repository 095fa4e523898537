"""POST /v1/predict: texts in, labels out. Knows no device, and no file of an adapter."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from adapters.spec import AdapterSpec
from adapters.tokenizer import Encoding, TextEncoder
from service.engine.interface import AdapterKey, Completion, Entry, RowResult, cost_of
from service.errors import AdapterLoadFailed, InvalidRequest, TooLarge
from service.lifecycle import Service, service_of
from service.reporting import Reporter
from service.routes.bodies import JsonResponse, read_json
from service.routes.connection import while_connected
from service.routes.documentation import PREDICT
from service.routes.errors import MAX_DETAILS, faults_of
from service.routes.schemas import PredictInput, PredictRequest
from service.settings import Settings

# Below this many characters tokenizing takes less time than handing it to a thread and back.
INLINE_CHARACTERS = 2000
# A request of valid inputs has at most this many fields beside and in each of them.
_REQUEST_FIELDS = len(PredictRequest.model_fields)
_INPUT_FIELDS = len(PredictInput.model_fields)
_UNCUT = 2**31 - 1

PATH = "/v1/predict"
router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Text:
    """One input, its adapter found."""

    text: str
    text_pair: str | None
    id: str | None
    key: AdapterKey
    spec: AdapterSpec


@router.post(PATH, **PREDICT)
async def predict(request: Request) -> Response:
    """Classify texts, each by its own adapter.

    All inputs of a request are answered together or not at all. An empty text is classified like
    any other.
    """
    service, started = service_of(request), monotonic()
    asked = parse_request(
        await read_json(request, service.settings.max_body_bytes), service.settings
    )
    texts = _texts(asked, service)
    encodings, tokenize_seconds = await _encode(service.encoder, texts, service.metrics)
    if not asked.truncate:
        await _refuse_truncated(service.encoder, texts, encodings)
    entries = [
        Entry(text.key, encoding, cost_of(encoding, text.spec), asked.explain)
        for text, encoding in zip(texts, encodings, strict=True)
    ]
    timeout_ms = asked.timeout_ms or service.settings.default_timeout_ms
    answering = _answer(service, entries, deadline=started + timeout_ms / 1000)
    completion = await while_connected(request, answering)
    results = [
        _result(text, encoding, row, asked.top_k)
        for text, encoding, row in zip(texts, encodings, completion.rows, strict=True)
    ]
    if asked.explain:
        for result, encoding, row in zip(results, encodings, completion.rows, strict=True):
            result["explanation"] = _explanation(service.encoder.tokens(encoding), row)
    for result in results:
        service.metrics.predicted(result["adapter"], result["label"])
    return JsonResponse({"results": results, "timings_ms": _timings(tokenize_seconds, completion)})


def parse_request(content: Any, settings: Settings) -> PredictRequest:
    """Validate a body.

    Raises:
        TooLarge: more inputs than allowed; looked at before any of them is.
        InvalidRequest: with every fault and its place.
    """
    if isinstance(content, dict):
        inputs = content.get("inputs")
        count = len(inputs) if isinstance(inputs, list) else 1
        if count > settings.max_inputs:
            raise TooLarge(
                f"{count} inputs in one request, at most {settings.max_inputs} are allowed"
            )
        # A fault is far larger than the field that it is about: a body of junk fields must not
        # become a list of them.
        items: Iterable[Any] = inputs if isinstance(inputs, list) else (inputs,)
        fields = len(content) + sum(len(item) for item in items if isinstance(item, dict))
        if fields > 10 * (_REQUEST_FIELDS + count * _INPUT_FIELDS):
            raise InvalidRequest([f"body: {fields} fields, far more than there are"])
    try:
        return PredictRequest.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(faults_of(error.errors())) from None


def _texts(asked: PredictRequest, service: Service) -> list[_Text]:
    """
    Raises:
        InvalidRequest: inputs that name no adapter while the request has no default either.
        UnknownAdapter, UnknownRevision, IncompatibleAdapter, DamagedFile: of the first input that
        meets one.
    """
    inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    texts, faults = [], []
    for index, item in enumerate(inputs):
        named = None if isinstance(item, str) else item.adapter
        reference = named or asked.adapter
        if reference is None:
            faults.append(f"inputs.{index}.adapter: missing, and the request names none")
            continue
        key, spec = service.catalog.resolve(reference)
        if isinstance(item, str):
            texts.append(_Text(item, None, None, key, spec))
        else:
            texts.append(_Text(item.text, item.text_pair, item.id, key, spec))
    if faults:
        raise InvalidRequest(faults[:MAX_DETAILS])
    return texts


async def _encode(
    encoder: TextEncoder, texts: Sequence[_Text], metrics: Reporter
) -> tuple[list[Encoding], float]:
    """Encodings in the texts' order, and the seconds that it took."""
    started = perf_counter()
    characters = sum(len(item.text) + len(item.text_pair or "") for item in texts)
    if characters < INLINE_CHARACTERS:
        encodings = [
            encoder.encode(item.text, item.text_pair, max_length=item.spec.max_length)
            for item in texts
        ]
    else:
        encodings = await asyncio.to_thread(_encode_many, encoder, texts)
    seconds = perf_counter() - started
    metrics.tokenized(seconds, truncated=sum(encoding.truncated for encoding in encodings))
    return encodings, seconds


def _encode_many(encoder: TextEncoder, texts: Sequence[_Text]) -> list[Encoding]:
    lengths = [item.spec.max_length for item in texts]
    found: dict[int, Encoding] = {}
    for length in set(lengths):
        mine = [index for index, item in enumerate(lengths) if item == length]
        pairs = [(texts[index].text, texts[index].text_pair) for index in mine]
        found.update(zip(mine, encoder.encode_batch(pairs, max_length=length), strict=True))
    return [found[index] for index in range(len(texts))]


async def _refuse_truncated(
    encoder: TextEncoder, texts: Sequence[_Text], encodings: Sequence[Encoding]
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
            f"inputs.{index}: {len(encoding)} tokens, adapter {texts[index].key.name!r} reads "
            f"{texts[index].spec.max_length} and truncate is false"
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


def _result(text: _Text, encoding: Encoding, row: RowResult, top_k: int | None) -> dict[str, Any]:
    """The shape of `schemas.Result`, without the detour over its model."""
    labels, scores = text.spec.labels, row.scores.tolist()
    # Stable, as its reverse is: of equal scores the earlier label comes first.
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
    return {
        "id": text.id,
        "adapter": text.key.name,
        "revision": text.key.revision,
        "label": labels[order[0]],
        "score": scores[order[0]],
        "scores": [{"label": labels[index], "score": scores[index]} for index in order],
        "tokens": len(encoding),
        "truncated": encoding.truncated,
    }


def _explanation(tokens: Sequence[str], row: RowResult) -> list[dict[str, Any]]:
    assert row.token_weights is not None, "the entry asked for them"
    weights = row.token_weights.tolist()
    return [
        {"token": token, "weight": weight} for token, weight in zip(tokens, weights, strict=True)
    ]


def _timings(tokenize_seconds: float, completion: Completion) -> dict[str, float]:
    return {
        "tokenize": round(tokenize_seconds * 1000, 3),
        "queue": round(completion.queue_seconds * 1000, 3),
        "inference": round(completion.inference_seconds * 1000, 3),
    }
