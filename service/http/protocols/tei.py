"""The routes of Text Embeddings Inference (TEI), for its clients: an adapter is a model.

`/adapters/{name}` is the base URL of a TEI server for that adapter; routes without a name use the
service's `default_adapter`. A body with `parameters` comes from a client of the Hugging Face
Inference API, such as `huggingface_hub.InferenceClient`: its answer is a list of lists.
"""

import math
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter
from pydantic import BeforeValidator
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from adapters import __version__
from adapters.format.spec import AdapterSpec
from adapters.tokenizer import End
from service.catalog.entry import Resolved
from service.errors import InvalidRequest, NoInputs, TooLarge
from service.http.answer_size import AnswerShape
from service.http.bodies import JsonResponse, in_json, read_as
from service.http.classify import Answers, classify, note_headers, ranked
from service.http.embedding import embed
from service.http.lifecycle import Service, service_of
from service.http.openapi.compatible import (
    TEI_ADAPTER_HEALTH,
    TEI_EMBED,
    TEI_HEALTH,
    TEI_INFO,
    TEI_INFO_DEFAULT,
    TEI_PREDICT,
    TEI_PREDICT_DEFAULT,
    TEI_RERANK,
    TEI_RERANK_DEFAULT,
)
from service.http.openapi.schemas import Lenient, Positive
from service.http.protocols.reranking import rerank
from service.http.texts import TextMaker
from service.http.turns import in_turns

router = APIRouter()

# `{"score":-103.27892990343185,"label":},`
SCORE_BYTES = 44
# The smallest float32: a score of zero has no logarithm.
_SMALLEST_SCORE = 1e-45
_EXPECTED = "expected a string, a pair [string, string], or a list of [string] and [string, string]"


class PipelineParameters(Lenient):
    """The parameters of the Inference API."""

    top_k: Positive | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None


class _Cut(Lenient):
    """What is left out of a text that is too long."""

    truncate: bool | None = None
    truncation_direction: Annotated[
        Literal["left", "right"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = "right"

    @property
    def cut(self) -> End | Literal["nothing"]:
        if self.truncate is False:
            return "nothing"
        return "tail" if self.truncation_direction == "right" else "head"


class TeiPredictRequest(_Cut):
    """A text, a pair `[a, b]`, or a batch `[[a], [a, b], ...]`."""

    inputs: Any
    raw_scores: bool = False
    parameters: PipelineParameters | None = None


class TeiEmbedRequest(_Cut):
    """A text or a list of texts; no token ids."""

    inputs: str | list[str]
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: Positive | None = None


class TeiRerankRequest(_Cut):
    """label: not of TEI, whose rerankers have one score: the label that texts are sorted by."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    label: str | None = None


@router.post("/predict", **TEI_PREDICT_DEFAULT)
@router.post("/", **TEI_PREDICT_DEFAULT)
@router.post("/invocations", **TEI_PREDICT_DEFAULT)
async def predict_by_default(request: Request) -> Response:
    """Classify by the service's default adapter."""
    return await _predict(request, default_adapter(service_of(request)))


@router.post("/adapters/{name}/predict", **TEI_PREDICT)
@router.post("/adapters/{name}", **TEI_PREDICT)
async def predict_by_name(request: Request, name: str) -> Response:
    """Classify by an adapter: `name`, or `name@prefix` for one of its revisions."""
    return await _predict(request, service_of(request).catalog.resolve(name))


@router.post("/rerank", **TEI_RERANK_DEFAULT)
async def rerank_by_default(request: Request) -> Response:
    """Sort texts by how well they fit a query, by the service's default adapter."""
    return await _rerank(request, default_adapter(service_of(request)))


@router.post("/adapters/{name}/rerank", **TEI_RERANK)
async def rerank_by_name(request: Request, name: str) -> Response:
    """Sort texts by how well they fit a query, by an adapter for pairs."""
    return await _rerank(request, service_of(request).catalog.resolve(name))


@router.post("/embed", **TEI_EMBED)
async def embed_texts(request: Request) -> Response:
    """The vectors of texts, from the backbone without an adapter."""
    started, service = monotonic(), service_of(request)
    body = await read_as(TeiEmbedRequest, request)
    if body.prompt_name is not None:
        raise InvalidRequest(["prompt_name: the backbone has no prompts: put it before the text"])
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    found = await embed(
        request,
        texts,
        deadline=started + service.settings.default_timeout_ms / 1000,
        cut=body.cut,
        normalize=body.normalize,
        dimensions=body.dimensions,
        place="inputs",
    )
    headers = _timings(
        service,
        seconds=monotonic() - started,
        characters=sum(map(len, texts)),
        tokens=found.tokens,
        tokenize=found.tokenize_seconds,
        queue=found.queue_seconds,
        inference=found.inference_seconds,
        truncated=found.truncated,
    )
    return JsonResponse(await in_turns(map(in_json, found.vectors)), headers=headers)


@router.get("/info", **TEI_INFO_DEFAULT)
async def info_of_default(request: Request) -> Response:
    """The labels of the default adapter, and the service's limits."""
    return _info(service_of(request), default_adapter(service_of(request)))


@router.get("/adapters/{name}/info", **TEI_INFO)
async def info_of_adapter(request: Request, name: str) -> Response:
    """The labels of an adapter, and the service's limits."""
    return _info(service_of(request), service_of(request).catalog.resolve(name))


@router.get("/health", **TEI_HEALTH)
@router.get("/ping", **TEI_HEALTH)
async def health(request: Request) -> Response:
    """Whether requests should be sent here now."""
    if service_of(request).health().ready:
        return Response()
    return JsonResponse({"error": "unhealthy", "error_type": "unhealthy"}, status_code=503)


@router.get("/adapters/{name}/health", **TEI_ADAPTER_HEALTH)
async def health_of_adapter(request: Request, name: str) -> Response:
    """Whether an adapter can be asked now."""
    service_of(request).catalog.resolve(name)
    return Response()


def default_adapter(service: Service) -> Resolved:
    """
    Raises:
        HTTPException: 404, no default adapter is set.
        UnknownAdapter, UnknownRevision, IncompatibleAdapter, DamagedFile, UnloadedAdapter: it is
        set, but cannot be served.
    """
    reference = service.settings.default_adapter
    if reference is None:
        raise HTTPException(
            404, "no adapter is named: ask /adapters/NAME/predict, or set IDSPAM_DEFAULT_ADAPTER"
        )
    return service.catalog.resolve(reference)


async def _predict(request: Request, adapter: Resolved) -> Response:
    started, service = monotonic(), service_of(request)
    body = await read_as(TeiPredictRequest, request)
    pairs, is_batch = _pairs(body.inputs, service.settings.max_inputs)
    text_of = TextMaker(request)
    texts = [
        text_of(adapter, text, pair, f"inputs.{index}" if is_batch else "inputs")
        for index, (text, pair) in enumerate(pairs)
    ]
    answers = await classify(
        request,
        texts,
        deadline=started + service.settings.default_timeout_ms / 1000,
        cut=body.cut,
        shape=AnswerShape(
            SCORE_BYTES,
            labels=True,
            top_k=body.parameters.top_k if body.parameters else None,
            advice="ask for fewer labels with `parameters.top_k`, or send fewer inputs",
        ),
    )
    content = await in_turns(_ranked_scores(body, answers))
    headers = _headers(service, answers, seconds=monotonic() - started)
    # TEI answers a batch alone with a list of lists, the Inference API every request.
    nested = is_batch or body.parameters is not None
    return JsonResponse(content if nested else content[0], headers=headers)


async def _rerank(request: Request, adapter: Resolved) -> Response:
    started, service = monotonic(), service_of(request)
    body = await read_as(TeiRerankRequest, request)
    ranking = await rerank(
        request,
        adapter,
        body.query,
        body.texts,
        label=body.label,
        deadline=started + service.settings.default_timeout_ms / 1000,
        cut=body.cut,
        place="texts",
    )
    content = []
    for index in ranking.order:
        score = ranking.scores[index]
        rank: dict[str, Any] = {"index": index}
        if body.return_text:
            rank["text"] = body.texts[index]
        rank["score"] = _raw(score, adapter.spec) if body.raw_scores else score
        content.append(rank)
    headers = _headers(service, ranking.answers, seconds=monotonic() - started)
    return JsonResponse(content, headers=headers)


def _pairs(inputs: Any, limit: int) -> tuple[list[tuple[str, str | None]], bool]:
    """The texts, and whether they are a batch.

    TEI's convention: `[a, b]` is one pair and not two texts, `[a]` is one text.

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


def _pair(item: Any, place: str) -> tuple[str, str | None]:
    if not isinstance(item, list) or not all(isinstance(text, str) for text in item):
        raise InvalidRequest([f"{place}: {_EXPECTED}"])
    if not 1 <= len(item) <= 2:
        raise InvalidRequest([f"{place}: {len(item)} strings, expected one or a pair"])
    if not any(item):
        raise InvalidRequest([f"{place}: cannot be empty"])
    return item[0], item[1] if len(item) == 2 else None


def _ranked_scores(body: TeiPredictRequest, answers: Answers) -> Iterator[orjson.Fragment]:
    """Every text's labels, the best first.

    Raises:
        InvalidRequest: the adapter was not trained with the activation that the request names.
    """
    parameters = body.parameters or PipelineParameters()
    activation = parameters.function_to_apply
    # All texts have the same adapter, and its revisions that answer texts have the same labels.
    spec = answers.texts[0].spec
    if activation not in (None, "none", spec.activation):
        raise InvalidRequest(
            [f"parameters.function_to_apply: the adapter answers by {spec.activation}"]
        )
    raw = body.raw_scores or activation == "none"
    for row in answers.rows:
        yield in_json(
            [
                {"score": _raw(score, spec) if raw else score, "label": spec.labels[index]}
                for index, score in ranked(row.scores, parameters.top_k)
            ]
        )


def _raw(score: float, spec: AdapterSpec) -> float:
    """A logit of this score. A softmax determines its logits up to a constant only; these are the
    ones whose exponentials sum to one."""
    log = math.log(max(score, _SMALLEST_SCORE))
    return log if spec.activation == "softmax" else log - math.log(max(1 - score, _SMALLEST_SCORE))


def _headers(service: Service, answers: Answers, *, seconds: float) -> Mapping[str, str]:
    """TEI's timings in whole milliseconds, and what its body has no place for."""
    timings = _timings(
        service,
        seconds=seconds,
        characters=sum(len(item.text) + len(item.text_pair or "") for item in answers.texts),
        tokens=answers.tokens,
        tokenize=answers.tokenize_seconds,
        queue=answers.queue_seconds,
        inference=answers.inference_seconds,
        truncated=answers.truncated,
    )
    return timings | note_headers(answers)


def _timings(
    service: Service,
    *,
    seconds: float,
    characters: int,
    tokens: int,
    tokenize: float,
    queue: float,
    inference: float,
    truncated: int,
) -> dict[str, str]:
    total = str(round(seconds * 1000))
    return {
        "x-compute-type": service.engine.info.device,
        "x-compute-time": total,
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(tokens),
        "x-total-time": total,
        "x-tokenization-time": str(round(tokenize * 1000)),
        "x-queue-time": str(round(queue * 1000)),
        "x-inference-time": str(round(inference * 1000)),
        "x-truncated-inputs": str(truncated),
    }


def _info(service: Service, adapter: Resolved) -> Response:
    settings, info, spec = service.settings, service.engine.info, adapter.spec
    load = service.engine.load
    limit = settings.max_waiting_tokens or (0 if load is None else load.limit)
    classifier = {
        "id2label": {str(index): label for index, label in enumerate(spec.labels)},
        "label2id": {label: index for index, label in enumerate(spec.labels)},
    }
    content = {
        "model_id": info.identity.name,
        "model_sha": adapter.key.revision,
        "model_dtype": info.dtype,
        "served_model_name": adapter.key.name,
        "model_type": {"classifier": classifier},
        # Admission counts tokens: this many texts of the maximum length may wait.
        "max_concurrent_requests": max(1, limit // spec.max_length),
        "max_input_length": spec.max_length,
        "max_batch_tokens": settings.batch_tokens(info.device),
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_inputs,
        "auto_truncate": True,
        "tokenization_workers": settings.workers or 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
    return JsonResponse(content)
