"""Open Inference Protocol V2: server, metadata, ready, infer. Knows no tensor's bytes.

An adapter is a model, its revisions are the model's versions: the first characters of one pin it.
"""

from collections.abc import Callable, Mapping
from time import monotonic
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters import __version__
from adapters.errors import AdapterError, UnknownAdapter, UnknownRevision
from service.catalog.entry import Resolved
from service.errors import MalformedRequest
from service.http.bodies import JsonResponse
from service.http.classify import Answers, Text, classify
from service.http.errors import Refusal
from service.http.lifecycle import Service, service_of
from service.http.protocols.oip.openapi import (
    INFER,
    LIVE,
    MODEL,
    MODEL_READY,
    MODELS,
    READY,
    SERVER,
)
from service.http.protocols.oip.tensors import (
    INPUTS,
    LENGTH_HEADER,
    InferRequest,
    Output,
    RequestParameters,
    Wanted,
    classes_of,
    encoded,
    parsed,
    read_parts,
    texts_of,
    wanted_of,
)

router = APIRouter()

NAME, PLATFORM = "id-spam-service", "idspam_safetensors"
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository", "parameters")


def shape(refusal: Refusal) -> Response:
    """The protocol's errors are one sentence; what the details list is part of it."""
    # Neither server knows a 422.
    status = 400 if refusal.kind.status == 422 else refusal.kind.status
    return refusal.response({"error": refusal.message}, status=status)


@router.get("/v2", **SERVER)
async def server() -> Response:
    """What this is; answered before it is ready, too."""
    return JsonResponse({"name": NAME, "version": __version__, "extensions": EXTENSIONS})


@router.get("/v2/health/live", **LIVE)
async def live(request: Request) -> Response:
    """Whether the process can do its work."""
    health = service_of(request).health()
    return _told({"live": health.live}, health.reason, well=health.live, otherwise=503)


@router.get("/v2/health/ready", **READY)
async def ready(request: Request) -> Response:
    """Whether requests should be sent here now."""
    health = service_of(request).health()
    return _told({"ready": health.ready}, health.reason, well=health.ready, otherwise=503)


@router.get("/v2/models", **MODELS)
async def models(request: Request) -> Response:
    """The adapters that can be asked now."""
    entries = service_of(request).catalog.entries()
    return JsonResponse({"models": [item.name for item in entries if item.refusal is None]})


@router.get("/v2/models/{name}", **MODEL)
async def model(request: Request, name: str) -> Response:
    """An adapter's inputs and outputs."""
    return _metadata(service_of(request), name)


@router.get("/v2/models/{name}/versions/{version}", **MODEL)
async def model_version(request: Request, name: str, version: str) -> Response:
    """The same of one of its revisions."""
    return _metadata(service_of(request), _reference(name, version))


@router.get("/v2/models/{name}/ready", **MODEL_READY)
async def model_ready(request: Request, name: str) -> Response:
    """Whether an adapter can be asked now."""
    return _readiness(service_of(request), name)


@router.get("/v2/models/{name}/versions/{version}/ready", **MODEL_READY)
async def model_version_ready(request: Request, name: str, version: str) -> Response:
    """The same of one of its revisions."""
    return _readiness(service_of(request), _reference(name, version))


@router.post("/v2/models/{name}/infer", **INFER)
async def infer(request: Request, name: str) -> Response:
    """Classify texts or pairs by an adapter."""
    return await _infer(request, name)


@router.post("/v2/models/{name}/versions/{version}/infer", **INFER)
async def infer_version(request: Request, name: str, version: str) -> Response:
    """The same by one of its revisions."""
    return await _infer(request, _reference(name, version))


def _reference(name: str, version: str) -> str:
    return f"{name}@{version}"


def _told(
    content: Mapping[str, Any], reason: str | None, *, well: bool, otherwise: int
) -> Response:
    """A yes, or a no that says why. Triton's client looks at the status, KServe's at both."""
    if well:
        return JsonResponse(content)
    return JsonResponse({**content, "error": reason}, status_code=otherwise)


def _metadata(service: Service, reference: str) -> Response:
    (name, _), spec = service.catalog.resolve(reference)
    entry = service.catalog.entry(name)
    versions = dict.fromkeys([entry.current, *(item.revision for item in entry.revisions)])
    outputs = {"label": ("BYTES", [-1]), "probs": ("FP32", [-1, len(spec.labels)])}
    outputs |= {"truncated": ("BOOL", [-1]), "tokens": ("INT32", [-1])}
    return JsonResponse(
        {
            "name": name,
            "versions": [item for item in versions if item not in entry.unusable],
            "platform": PLATFORM,
            "inputs": [{"name": item, "datatype": "BYTES", "shape": [-1]} for item in INPUTS],
            "outputs": [
                {"name": item, "datatype": datatype, "shape": dimensions}
                for item, (datatype, dimensions) in outputs.items()
            ],
        }
    )


def _readiness(service: Service, reference: str) -> Response:
    name, reason = reference.partition("@")[0], None
    try:
        service.catalog.resolve(reference)
    except (UnknownAdapter, UnknownRevision):
        raise
    except AdapterError as error:
        reason = str(error)
    # A client's error by the protocol, whoever is to blame: this answer says no and is no failure.
    return _told({"name": name, "ready": not reason}, reason, well=not reason, otherwise=400)


async def _infer(request: Request, reference: str) -> Response:
    started, service = monotonic(), service_of(request)
    text, attached = await read_parts(request, service.settings.max_body_bytes)
    if not text:
        raise MalformedRequest("the body is empty, expected JSON")
    adapter = service.catalog.resolve(reference)
    asked = parsed(InferRequest, text)
    parameters = asked.parameters or RequestParameters()
    wanted = wanted_of(asked)
    pairs = texts_of(asked.inputs, attached, limit=service.settings.max_inputs)
    seconds = parameters.timeout / 1e6 or service.settings.default_timeout_ms / 1e3
    answers = await classify(
        request,
        [
            Text(item, pair, adapter.key, adapter.spec, f"input 'text': element {index}")
            for index, (item, pair) in enumerate(pairs)
        ],
        deadline=started + seconds,
        cut="tail" if parameters.truncate else "nothing",
    )
    return _answer(asked.id, adapter, [_output(item, adapter, answers) for item in wanted], answers)


def _answer(
    mark: str | None, adapter: Resolved, outputs: list[Output], answers: Answers
) -> Response:
    head: dict[str, Any] = {
        "model_name": adapter.key.name,
        "model_version": adapter.key.revision,
    }
    if mark is not None:
        head["id"] = mark
    if answers.truncated:
        head["parameters"] = {"truncated": answers.truncated}
    body, length = encoded(head, outputs)
    if length is None:
        return Response(body, media_type="application/json")
    headers = {LENGTH_HEADER: str(length)}
    return Response(body, media_type="application/octet-stream", headers=headers)


def _output(wanted: Wanted, adapter: Resolved, answers: Answers) -> Output:
    if wanted.classes:
        values = classes_of(_probs(adapter, answers), adapter.spec.labels, wanted.classes)
    else:
        values = _VALUES[wanted.name](adapter, answers)
    return Output(wanted.name, values, wanted.binary)


def _label(_: Resolved, answers: Answers) -> npt.NDArray[np.object_]:
    return np.array(answers.best, dtype=object)


def _probs(_: Resolved, answers: Answers) -> npt.NDArray[np.float32]:
    return np.stack([row.scores for row in answers.rows])


def _truncated(_: Resolved, answers: Answers) -> npt.NDArray[np.bool_]:
    return np.array([item.truncated for item in answers.encodings], dtype=np.bool_)


def _tokens(_: Resolved, answers: Answers) -> npt.NDArray[np.int32]:
    return np.array([len(item) for item in answers.encodings], dtype=np.int32)


_VALUES: Mapping[str, Callable[[Resolved, Answers], npt.NDArray[Any]]] = MappingProxyType(
    {"label": _label, "probs": _probs, "truncated": _truncated, "tokens": _tokens}
)
