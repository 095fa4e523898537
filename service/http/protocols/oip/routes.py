"""Open Inference Protocol V2: server, metadata, ready, infer.

An adapter is a model; its revisions are the model's versions, named by their first characters.
"""

from collections.abc import Mapping, Sequence
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
from service.errors import MalformedRequest
from service.http.answer_size import AnswerShape
from service.http.bodies import JsonResponse, parse_json, validated
from service.http.classify import Answers, classify
from service.http.lifecycle import service_of
from service.http.openapi.compatible import (
    OIP_INFER,
    OIP_LIVE,
    OIP_MODEL,
    OIP_MODEL_READY,
    OIP_MODELS,
    OIP_READY,
    OIP_SERVER,
)
from service.http.protocols.oip.tensors import (
    INPUTS,
    LENGTH_HEADER,
    InferRequest,
    OutputTensor,
    RequestParameters,
    SelectedOutput,
    encode_answer,
    read_parts,
    read_texts,
    selected_outputs,
    top_classes,
)
from service.http.texts import TextMaker
from service.http.turns import in_turns

router = APIRouter()

# In JSON: `0.12345678901234567,` and `false,`; and `"0.123456:4095:",` beside a label.
_SCORE_BYTES: Mapping[str, int] = MappingProxyType({"probs": 24, "predicted": 6})
_CLASS_BYTES = 20

NAME, PLATFORM = "id-spam-service", "idspam_safetensors"
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository", "parameters")


@router.get("/v2", **OIP_SERVER)
async def server() -> Response:
    """The server's name and version; answered also before it is ready."""
    return JsonResponse({"name": NAME, "version": __version__, "extensions": EXTENSIONS})


@router.get("/v2/health/live", **OIP_LIVE)
async def live(request: Request) -> Response:
    """Whether the process can do its work."""
    health = service_of(request).health()
    return _yes_or_no({"live": health.live}, health.reason, yes=health.live, no_status=503)


@router.get("/v2/health/ready", **OIP_READY)
async def ready(request: Request) -> Response:
    """Whether requests should be sent here now."""
    health = service_of(request).health()
    return _yes_or_no({"ready": health.ready}, health.reason, yes=health.ready, no_status=503)


@router.get("/v2/models", **OIP_MODELS)
async def models(request: Request) -> Response:
    """The adapters that can be served now."""
    entries = service_of(request).catalog.entries()
    return JsonResponse({"models": [entry.name for entry in entries if entry.refusal is None]})


@router.get("/v2/models/{name}", **OIP_MODEL)
async def model(request: Request, name: str) -> Response:
    """An adapter's inputs and outputs."""
    catalog = service_of(request).catalog
    (name, _), spec, _ = catalog.resolve(name)
    entry = catalog.entry(name)
    versions = dict.fromkeys([entry.current, *(stored.revision for stored in entry.revisions)])
    outputs = {
        "label": ("BYTES", [-1]),
        "probs": ("FP32", [-1, len(spec.labels)]),
        "truncated": ("BOOL", [-1]),
        "tokens": ("INT32", [-1]),
        "predicted": ("BOOL", [-1, len(spec.labels)]),
        "abstained": ("BOOL", [-1]),
        "revision": ("BYTES", [-1]),
    }
    return JsonResponse(
        {
            "name": name,
            "versions": [version for version in versions if version not in entry.unusable],
            "platform": PLATFORM,
            "inputs": [{"name": tensor, "datatype": "BYTES", "shape": [-1]} for tensor in INPUTS],
            "outputs": [
                {"name": output, "datatype": datatype, "shape": shape}
                for output, (datatype, shape) in outputs.items()
            ],
        }
    )


@router.get("/v2/models/{name}/versions/{version}", **OIP_MODEL)
async def model_version(request: Request, name: str, version: str) -> Response:
    """The same for one of its revisions."""
    return await model(request, f"{name}@{version}")


@router.get("/v2/models/{name}/ready", **OIP_MODEL_READY)
async def model_ready(request: Request, name: str) -> Response:
    """Whether an adapter can be served now."""
    reason = None
    try:
        service_of(request).catalog.resolve(name)
    except (UnknownAdapter, UnknownRevision):
        raise
    except AdapterError as error:
        reason = str(error)
    # The protocol answers 400 here, whatever the reason is; metrics count no error for it.
    content = {"name": name.partition("@")[0], "ready": not reason}
    return _yes_or_no(content, reason, yes=not reason, no_status=400)


@router.get("/v2/models/{name}/versions/{version}/ready", **OIP_MODEL_READY)
async def model_version_ready(request: Request, name: str, version: str) -> Response:
    """The same for one of its revisions."""
    return await model_ready(request, f"{name}@{version}")


@router.post("/v2/models/{name}/infer", **OIP_INFER)
async def infer(request: Request, name: str) -> Response:
    """Classify texts or pairs by an adapter."""
    started, service = monotonic(), service_of(request)
    text, attached = await read_parts(request, service.settings.max_body_bytes)
    if not text:
        raise MalformedRequest("the body is empty, expected JSON")
    adapter = service.catalog.resolve(name)
    body = validated(InferRequest, parse_json(text, most=service.settings.max_values))
    parameters = body.parameters or RequestParameters()
    outputs = selected_outputs(body)
    pairs = read_texts(body.inputs, attached, limit=service.settings.max_inputs)
    seconds = parameters.timeout / 1e6 or service.settings.default_timeout_ms / 1e3
    text_of = TextMaker(request)
    answers = await classify(
        request,
        [
            text_of(adapter, text, pair, f"input 'text': element {index}")
            for index, (text, pair) in enumerate(pairs)
        ],
        deadline=started + seconds,
        cut="tail" if parameters.truncate else "nothing",
        abstain_below=parameters.abstain_below,
        shape=_shape(outputs),
    )
    head: dict[str, Any] = {"model_name": adapter.key.name}
    if len(answers.revisions) == 1:
        # Two may have answered while texts are divided: the output 'revision' has each text's.
        head["model_version"] = answers.revisions[0]
    if body.id is not None:
        head["id"] = body.id
    notes = {"truncated": answers.truncated, "abstained": answers.abstentions}
    if any(notes.values()):
        head["parameters"] = {name: texts for name, texts in notes.items() if texts}
    tensors = [OutputTensor(out.name, await _values(out, answers), out.binary) for out in outputs]
    content, json_length = await encode_answer(head, tensors)
    headers = {"x-adapter-revision": ", ".join(answers.revisions)}
    if json_length is None:
        return Response(content, media_type="application/json", headers=headers)
    headers[LENGTH_HEADER] = str(json_length)
    return Response(content, media_type="application/octet-stream", headers=headers)


@router.post("/v2/models/{name}/versions/{version}/infer", **OIP_INFER)
async def infer_version(request: Request, name: str, version: str) -> Response:
    """The same by one of its revisions."""
    return await infer(request, f"{name}@{version}")


def _shape(outputs: Sequence[SelectedOutput]) -> AnswerShape:
    classes = next((output.classes for output in outputs if output.classes), None)
    whole = [output.name for output in outputs if not output.classes]
    wide = sum(_SCORE_BYTES.get(name, 0) for name in whole)
    return AnswerShape(
        wide + (_CLASS_BYTES if classes else 0),
        labels=classes is not None,
        # Beside an output that has every label, one that has the best few is small.
        top_k=None if wide else classes,
        advice="ask for fewer labels with the parameter 'classification' of 'probs', "
        "or send fewer texts",
    )


def _yes_or_no(
    content: Mapping[str, Any], reason: str | None, *, yes: bool, no_status: int
) -> Response:
    """Triton's client reads only the status of such an answer, KServe's also its body."""
    if yes:
        return JsonResponse(content)
    return JsonResponse({**content, "error": reason}, status_code=no_status)


async def _values(output: SelectedOutput, answers: Answers) -> npt.NDArray[Any]:
    match output.name:
        case "label":
            return np.array(answers.labels, dtype=object)
        case "truncated":
            return np.array([item.truncated for item in answers.encodings], dtype=np.bool_)
        case "abstained":
            every = range(len(answers.texts))
            return np.array([answers.abstained.get(index, False) for index in every], np.bool_)
        case "tokens":
            return np.array([len(item) for item in answers.encodings], dtype=np.int32)
        case "revision":
            return np.array([text.key.revision for text in answers.texts], dtype=object)
    scores = np.stack([row.scores for row in answers.rows])
    # All texts have the same adapter, and its revisions that answer texts have the same labels.
    spec = answers.texts[0].spec
    if output.name == "predicted" and spec.multi_label:
        pairs = zip(answers.texts, scores, strict=True)
        reached = (row >= np.array(text.spec.label_thresholds) for text, row in pairs)
        return np.stack(await in_turns(reached))
    if output.name == "predicted":
        best: npt.NDArray[np.bool_] = np.arange(len(spec.labels)) == scores.argmax(axis=1)[:, None]
        return best
    if output.classes:
        named = top_classes(scores, spec.labels, output.classes)
        return np.array(await in_turns(named), dtype=object)
    return scores
