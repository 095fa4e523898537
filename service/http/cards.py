"""/v1/adapters/{name}/card: the model card of a revision, which is Markdown."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.catalog.entry import MAX_CARD_BYTES
from service.errors import MalformedRequest
from service.http.adapters import condition_of, etag
from service.http.bodies import content_type, read_body, refuse_encoded
from service.http.lifecycle import origin_of, service_of
from service.http.openapi.documentation import PUT_CARD, SHOW_CARD
from service.http.queries import refuse_unknown_query

router = APIRouter(dependencies=[Depends(refuse_unknown_query)])

_Revision = Annotated[str | None, Query(max_length=64)]
_TYPES = ("text/markdown", "text/plain")


@router.get("/v1/adapters/{name}/card", **SHOW_CARD)
async def show_card(request: Request, name: str, revision: _Revision = None) -> Response:
    """The model card of a revision, by default the current one. `ETag` names the revision.

    Whoever shows it must not take it for safe: it is what somebody uploaded.
    """
    revision, card = await service_of(request).catalog.card(name, revision)
    headers = etag(revision) | {"X-Content-Type-Options": "nosniff"}
    return Response(card, media_type="text/markdown; charset=utf-8", headers=headers)


@router.put("/v1/adapters/{name}/card", **PUT_CARD)
async def put_card(request: Request, name: str, revision: _Revision = None) -> Response:
    """Keep a model card with a revision, by default the current one, in place of the one it had.
    It goes when the revision goes."""
    kind = content_type(request) or "none"
    if kind not in _TYPES:
        raise HTTPException(415, f"Content-Type is {kind}, expected text/markdown")
    refuse_encoded(request)
    body = await read_body(request, MAX_CARD_BYTES)
    try:
        card = body.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the card is not UTF-8: {error}") from None
    revision = await service_of(request).catalog.describe(
        name, revision, card, condition_of(request), by=origin_of(request)
    )
    return Response(status_code=204, headers=etag(revision))
