"""vLLM's classification route, for its clients: `model` names the adapter. Knows no device."""

from time import monotonic, time
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from service.errors import InvalidRequest, NoInputs, TooLarge
from service.http.bodies import JsonResponse, read_json
from service.http.classify import Answers, Text, classify
from service.http.errors import Refusal, faults_of
from service.http.lifecycle import Service, service_of
from service.http.openapi.compatible import VLLM_CLASSIFY
from service.http.protocols.tei import default_adapter
from service.observability.logs import request_id

router = APIRouter()

_TYPES = {401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError"}


class VllmClassifyRequest(BaseModel):
    """Fields that only steer that server (`priority`, `user`, ...) are ignored.

    truncate_prompt_tokens: null refuses too long a text, -1 or a larger number than the adapter
    reads cuts it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model: str | None = None
    input: str | list[str]
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    add_special_tokens: bool = True
    use_activation: bool | None = None


def shape(refusal: Refusal) -> Response:
    """That server's errors."""
    status = refusal.kind.status
    # It knows no 422.
    status = 400 if status == 422 else status
    name = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    content = {"message": refusal.message, "type": name, "param": None, "code": status}
    return refusal.response({"error": content}, status=status)


@router.post("/classify", **VLLM_CLASSIFY)
async def classify_texts(request: Request) -> Response:
    """Classify texts by the adapter that `model` names, or by the default one."""
    started, service = monotonic(), service_of(request)
    asked = _parse(await read_json(request, service.settings.max_body_bytes))
    texts = _texts(asked, service)
    answers = await classify(
        request,
        texts,
        deadline=started + service.settings.default_timeout_ms / 1000,
        cut="nothing" if asked.truncate_prompt_tokens is None else "tail",
    )
    tokens = sum(map(len, answers.encodings))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    return JsonResponse(
        {
            "id": f"classify-{request_id.get()}",
            "object": "list",
            "created": int(time()),
            "model": asked.model or texts[0].key.name,
            "data": _data(answers),
            "usage": usage | {"prompt_tokens_details": None},
        }
    )


def _parse(content: Any) -> VllmClassifyRequest:
    """
    Raises:
        InvalidRequest: with every fault; also what cannot be done here, and is not ignored.
    """
    try:
        asked = VllmClassifyRequest.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(faults_of(error.errors())) from None
    faults = []
    if not asked.add_special_tokens:
        faults.append("add_special_tokens: adapters are trained with special tokens")
    if asked.use_activation is False:
        faults.append("use_activation: only scores are kept, not the logits before them")
    if faults:
        raise InvalidRequest(faults)
    return asked


def _texts(asked: VllmClassifyRequest, service: Service) -> list[Text]:
    """
    Raises:
        InvalidRequest, NoInputs, TooLarge: of the inputs.
        UnknownAdapter, UnknownRevision, IncompatibleAdapter, DamagedFile: of the model.
    """
    inputs = [asked.input] if isinstance(asked.input, str) else asked.input
    if not inputs:
        raise NoInputs
    if len(inputs) > service.settings.max_inputs:
        raise TooLarge(f"{len(inputs)} inputs, at most {service.settings.max_inputs} are allowed")
    key, spec = (
        default_adapter(service) if asked.model is None else service.catalog.resolve(asked.model)
    )
    limit = asked.truncate_prompt_tokens
    if limit is not None and 0 <= limit < spec.max_length:
        raise InvalidRequest(
            [f"truncate_prompt_tokens: -1 or at least the {spec.max_length} that the adapter reads"]
        )
    return [Text(text, None, key, spec, f"input.{index}") for index, text in enumerate(inputs)]


def _data(answers: Answers) -> list[dict[str, Any]]:
    found = []
    for index, (label, row) in enumerate(zip(answers.best, answers.rows, strict=True)):
        scores = row.scores.tolist()
        found.append(
            {
                "index": index,
                "label": label,
                "probs": scores,
                "num_classes": len(scores),
            }
        )
    return found
