"""POST /v1/predict: texts in, labels out. Knows no device, and no file of an adapter."""

from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from adapters.backbone.tokenizer import Encoding
from service.catalog.view import CatalogView
from service.engine.interface import RowResult
from service.errors import InvalidRequest, TooLarge
from service.http.bodies import JsonResponse, read_json
from service.http.classify import Text, classify, ranked, timings_ms
from service.http.errors import MAX_DETAILS, faults_of
from service.http.lifecycle import service_of
from service.http.openapi.documentation import PREDICT
from service.http.openapi.schemas import PredictInput, PredictRequest
from service.settings import Settings

# A request of valid inputs has at most this many fields beside and in each of them.
_REQUEST_FIELDS = len(PredictRequest.model_fields)
_INPUT_FIELDS = len(PredictInput.model_fields)

PATH = "/v1/predict"
router = APIRouter()


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
    inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    timeout_ms = asked.timeout_ms or service.settings.default_timeout_ms
    answers = await classify(
        request,
        _texts(inputs, asked.adapter, service.catalog),
        deadline=started + timeout_ms / 1000,
        cut="tail" if asked.truncate else "nothing",
        explain=asked.explain,
    )
    results = [
        _result(item, text, encoding, row, asked.top_k)
        for item, text, encoding, row in zip(
            inputs, answers.texts, answers.encodings, answers.rows, strict=True
        )
    ]
    if asked.explain:
        for result, encoding, row in zip(results, answers.encodings, answers.rows, strict=True):
            result["explanation"] = _explanation(service.encoder.tokens(encoding), row)
    return JsonResponse({"results": results, "timings_ms": timings_ms(answers)})


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


def _texts(
    inputs: Sequence[str | PredictInput], default: str | None, catalog: CatalogView
) -> list[Text]:
    """
    Raises:
        InvalidRequest: inputs that name no adapter while the request has no default either.
        UnknownAdapter, UnknownRevision, IncompatibleAdapter, DamagedFile: of the first input that
        meets one.
    """
    texts, faults = [], []
    for index, item in enumerate(inputs):
        named = None if isinstance(item, str) else item.adapter
        reference = named or default
        if reference is None:
            faults.append(f"inputs.{index}.adapter: missing, and the request names none")
            continue
        key, spec = catalog.resolve(reference)
        place = f"inputs.{index}"
        if isinstance(item, str):
            texts.append(Text(item, None, key, spec, place))
        else:
            texts.append(Text(item.text, item.text_pair, key, spec, place))
    if faults:
        raise InvalidRequest(faults[:MAX_DETAILS])
    return texts


def _result(
    item: str | PredictInput, text: Text, encoding: Encoding, row: RowResult, top_k: int | None
) -> dict[str, Any]:
    """The shape of `schemas.Result`, without the detour over its model."""
    labels, scores = text.spec.labels, row.scores.tolist()
    order = ranked(scores)[:top_k]
    return {
        "id": None if isinstance(item, str) else item.id,
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
