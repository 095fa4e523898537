"""The routes of Text Embeddings Inference, for its clients: an adapter is a model. Knows no device.

`/adapters/{name}` is the base address of a server with that adapter; without a name it is the
service's `default_adapter`. Bodies that carry `parameters` are of the Hugging Face Inference API's
convention, which `huggingface_hub.InferenceClient` speaks: they are answered in a list of lists.
"""

import math
from collections.abc import Mapping
from time import monotonic
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from adapters import __version__
from adapters.backbone.tokenizer import End
from adapters.format.spec import AdapterSpec
from service.catalog.entry import Resolved
from service.errors import InvalidRequest, NoInputs, TooLarge
from service.http.bodies import JsonResponse, read_json
from service.http.classify import Answers, Text, classify, ranked
from service.http.errors import ERRORS, Refusal, faults_of
from service.http.lifecycle import Service, service_of
from service.http.openapi.compatible import TEI_HEALTH, TEI_INFO, TEI_PREDICT

router = APIRouter()

# A score of zero has no logarithm; this is the least that float32 holds.
_LEAST_SCORE = 1e-45
_EXPECTED = "expected a string, a pair [string, string], or a list of [string] and [string, string]"


class _Pair(NamedTuple):
    text: str
    text_pair: str | None


class _Lenient(BaseModel):
    """Fields that are not named are ignored, as that server ignores them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class PipelineParameters(_Lenient):
    """Of the Inference API."""

    top_k: int | None = Field(default=None, ge=1)
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None


class TeiPredictRequest(_Lenient):
    """A text, a pair `[a, b]`, or a batch `[[a], [a, b], ...]`."""

    inputs: Any
    truncate: bool | None = None
    truncation_direction: Annotated[
        Literal["left", "right"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = "right"
    raw_scores: bool = False
    parameters: PipelineParameters | None = None


def shape(refusal: Refusal) -> Response:
    """That server's errors: a sentence and one of its types, each with its status."""
    match refusal.kind.status:
        case 503:
            kind, status = "Unhealthy", 503
        case 429:
            kind, status = "Overloaded", 429
        case given if given >= 500:
            kind, status = "Backend", 424
        case given:
            empty = refusal.kind is ERRORS[NoInputs]
            kind, status = ("Empty", 400) if empty else ("Validation", given)
    return refusal.response({"error": refusal.message, "error_type": kind}, status=status)


@router.post("/predict", **TEI_PREDICT)
@router.post("/", **TEI_PREDICT)
@router.post("/invocations", **TEI_PREDICT)
async def predict_by_default(request: Request) -> Response:
    """Classify by the service's default adapter."""
    return await _predict(request, default_adapter(service_of(request)))


@router.post("/adapters/{name}/predict", **TEI_PREDICT)
@router.post("/adapters/{name}", **TEI_PREDICT)
async def predict_by_name(request: Request, name: str) -> Response:
    """Classify by an adapter: `name`, or `name@prefix` for one of its revisions."""
    return await _predict(request, service_of(request).catalog.resolve(name))


@router.get("/info", **TEI_INFO)
async def info_of_default(request: Request) -> Response:
    """What the default adapter answers, and the service's limits."""
    service = service_of(request)
    return JsonResponse(_info(service, default_adapter(service)))


@router.get("/adapters/{name}/info", **TEI_INFO)
async def info_of_adapter(request: Request, name: str) -> Response:
    """What an adapter answers, and the service's limits."""
    service = service_of(request)
    return JsonResponse(_info(service, service.catalog.resolve(name)))


@router.get("/health", **TEI_HEALTH)
@router.get("/ping", **TEI_HEALTH)
async def health(request: Request) -> Response:
    """Whether requests should be sent here now."""
    if service_of(request).health().ready:
        return Response()
    return JsonResponse({"error": "unhealthy", "error_type": "unhealthy"}, status_code=503)


@router.get("/adapters/{name}/health", **TEI_HEALTH)
async def health_of_adapter(request: Request, name: str) -> Response:
    """Whether an adapter can be asked now."""
    service_of(request).catalog.resolve(name)
    return Response()


def default_adapter(service: Service) -> Resolved:
    """
    Raises:
        HTTPException: 404, there is none.
        UnknownAdapter, UnknownRevision, IncompatibleAdapter, DamagedFile: it cannot be asked.
    """
    reference = service.settings.default_adapter
    if reference is None:
        raise HTTPException(
            404, "no adapter is named: ask /adapters/NAME/predict, or set IDSPAM_DEFAULT_ADAPTER"
        )
    return service.catalog.resolve(reference)


async def _predict(request: Request, adapter: Resolved) -> Response:
    started, service = monotonic(), service_of(request)
    content = await read_json(request, service.settings.max_body_bytes)
    try:
        asked = TeiPredictRequest.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(faults_of(error.errors())) from None
    pairs, many = _pairs(asked.inputs, service.settings.max_inputs)
    texts = [
        Text(text, pair, adapter.key, adapter.spec, f"inputs.{index}" if many else "inputs")
        for index, (text, pair) in enumerate(pairs)
    ]
    end: End = "tail" if asked.truncation_direction == "right" else "head"
    answers = await classify(
        request,
        texts,
        deadline=started + service.settings.default_timeout_ms / 1000,
        cut="nothing" if asked.truncate is False else end,
    )
    found = _ranked_by(asked, adapter.spec, answers)
    # The Inference API always answers with a list of lists; that server only to a batch.
    nested = many or asked.parameters is not None
    headers = _headers(service, answers, seconds=monotonic() - started)
    return JsonResponse(found if nested else found[0], headers=headers)


def _pairs(inputs: Any, limit: int) -> tuple[list[_Pair], bool]:
    """The texts, and whether they are a batch.

    `[a, b]` is one pair, not two texts, and `[a]` one text: that server's convention.

    Raises:
        NoInputs, InvalidRequest, TooLarge.
    """
    if isinstance(inputs, str):
        return [_pair([inputs], "inputs")], False
    if not isinstance(inputs, list):
        raise InvalidRequest([f"inputs: {_EXPECTED}"])
    if not inputs:
        raise NoInputs
    if isinstance(inputs[0], str):
        return [_pair(inputs, "inputs")], False
    if len(inputs) > limit:
        raise TooLarge(f"a batch of {len(inputs)}, at most {limit} are allowed")
    return [_pair(item, f"inputs.{index}") for index, item in enumerate(inputs)], True


def _pair(item: Any, place: str) -> _Pair:
    if not isinstance(item, list) or not all(isinstance(text, str) for text in item):
        raise InvalidRequest([f"{place}: {_EXPECTED}"])
    if not 1 <= len(item) <= 2:
        raise InvalidRequest([f"{place}: {len(item)} strings, expected one or a pair"])
    if not any(item):
        raise InvalidRequest([f"{place}: cannot be empty"])
    return _Pair(item[0], item[1] if len(item) == 2 else None)


def _ranked_by(
    asked: TeiPredictRequest, spec: AdapterSpec, answers: Answers
) -> list[list[dict[str, Any]]]:
    """
    Raises:
        InvalidRequest: another function than the one that the adapter was trained with.
    """
    parameters = asked.parameters or PipelineParameters()
    wanted = parameters.function_to_apply
    if wanted not in (None, "none", spec.activation):
        raise InvalidRequest(
            [f"parameters.function_to_apply: the adapter answers by {spec.activation}"]
        )
    raw = asked.raw_scores or wanted == "none"
    found = []
    for row in answers.rows:
        scores = row.scores.tolist()
        shown = [_raw(score, spec) for score in scores] if raw else scores
        found.append(
            [
                {"score": shown[index], "label": spec.labels[index]}
                for index in ranked(scores)[: parameters.top_k]
            ]
        )
    return found


def _raw(score: float, spec: AdapterSpec) -> float:
    """A logit of this score. Of a softmax they are known up to a constant only: here the one that
    makes their exponentials sum to one."""
    log = math.log(max(score, _LEAST_SCORE))
    return log if spec.activation == "softmax" else log - math.log(max(1 - score, _LEAST_SCORE))


def _headers(service: Service, answers: Answers, *, seconds: float) -> Mapping[str, str]:
    """That server's timings, whole milliseconds, and what its body has no place for."""
    total = str(round(seconds * 1000))
    characters = sum(len(item.text) + len(item.text_pair or "") for item in answers.texts)
    return {
        "x-compute-type": service.engine.info.device,
        "x-compute-time": total,
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(sum(map(len, answers.encodings))),
        "x-total-time": total,
        "x-tokenization-time": str(round(answers.tokenize_seconds * 1000)),
        "x-queue-time": str(round(answers.completion.queue_seconds * 1000)),
        "x-inference-time": str(round(answers.completion.inference_seconds * 1000)),
        "x-truncated-inputs": str(answers.truncated),
        "x-adapter-revision": answers.texts[0].key.revision,
    }


def _info(service: Service, adapter: Resolved) -> dict[str, Any]:
    settings, info, spec = service.settings, service.engine.info, adapter.spec
    classifier = {
        "id2label": {str(index): label for index, label in enumerate(spec.labels)},
        "label2id": {label: index for index, label in enumerate(spec.labels)},
    }
    return {
        "model_id": info.identity.name,
        "model_sha": adapter.key.revision,
        "model_dtype": info.dtype,
        "served_model_name": adapter.key.name,
        "model_type": {"classifier": classifier},
        # Admission counts tokens here: so many texts of the greatest length may wait.
        "max_concurrent_requests": settings.max_waiting_tokens // spec.max_length,
        "max_input_length": spec.max_length,
        "max_batch_tokens": settings.batch_tokens(info.device),
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_inputs,
        "auto_truncate": True,
        "tokenization_workers": max(1, settings.workers),
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
