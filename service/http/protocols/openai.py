"""OpenAI's route of embeddings, for its clients: `model` is the backbone."""

import base64
from time import monotonic
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.http.bodies import JsonResponse, in_json, read_as
from service.http.embedding import BASE64_BYTES, VALUE_BYTES, Vector, embed
from service.http.lifecycle import Service, service_of
from service.http.openapi.compatible import OPENAI_EMBEDDINGS
from service.http.openapi.schemas import MAX_INTEGER, Lenient, Positive, Whole
from service.http.protocols.truncation import check_limit
from service.http.turns import in_turns

router = APIRouter()


class EmbeddingsRequest(Lenient):
    """A text or a list of texts; no token ids. `user` is ignored.

    model: the backbone's name, or what follows its last slash; null is the same.
    truncate_prompt_tokens: vLLM's (`truncation.check_limit`).
    """

    model: str | None = None
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INTEGER), Whole] | None = None


@router.post("/v1/embeddings", **OPENAI_EMBEDDINGS)
async def embeddings(request: Request) -> Response:
    """The vectors of texts, from the backbone without an adapter, each of length one."""
    started, service = monotonic(), service_of(request)
    body = await read_as(EmbeddingsRequest, request)
    name = _checked_model(service, body.model)
    reads = service.engine.info.max_tokens
    check_limit(body.truncate_prompt_tokens, reads=reads, reader="backbone")
    texts = [body.input] if isinstance(body.input, str) else body.input
    in_base64 = body.encoding_format == "base64"
    found = await embed(
        request,
        texts,
        deadline=started + service.settings.default_timeout_ms / 1000,
        cut="nothing" if body.truncate_prompt_tokens is None else "tail",
        dimensions=body.dimensions,
        value_bytes=BASE64_BYTES if in_base64 else VALUE_BYTES,
        place="input",
    )
    made = (
        in_json(
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if in_base64 else vector,
            }
        )
        for index, vector in enumerate(found.vectors)
    )
    data = await in_turns(made)
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return JsonResponse({"object": "list", "data": data, "model": name, "usage": usage})


def _checked_model(service: Service, model: str | None) -> str:
    """The backbone's name.

    Raises:
        HTTPException: 404, another model is asked for: its vectors would be something else.
    """
    name = service.engine.info.identity.name
    if model not in (None, name, name.rsplit("/", 1)[-1]):
        raise HTTPException(404, f"there is no model {model[:128]!r}: embeddings are of {name!r}")
    return name


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
