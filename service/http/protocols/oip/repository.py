"""Open Inference Protocol V2: which models there are, load and unload. Knows no tensor.

KServe's and Triton's clients send different bodies here, or none.
"""

import asyncio
import base64
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.catalog.entry import CatalogEntry, Condition
from service.errors import InvalidRequest, TooLarge
from service.http.adapters import publish
from service.http.bodies import JsonResponse
from service.http.lifecycle import service_of
from service.http.protocols.oip.openapi import INDEX, LOAD, UNLOAD
from service.http.protocols.oip.tensors import IndexRequest, LoadRequest, parsed, read_parts

router = APIRouter()

# What the JSON may take around a file.
_AROUND_BYTES = 64 * 1024
_FILE = "file:"
# Of a load request's JSON. Base64 has none of these; a file's length of them would become objects.
_MARKS = (b",", b"[", b"{")
_MOST_MARKS = 10_000


@router.post("/v2/repository/index", **INDEX)
async def index(request: Request) -> Response:
    """Every adapter, and why it cannot be asked if so."""
    service = service_of(request)
    text, _ = await read_parts(request, service.settings.max_body_bytes)
    asked = parsed(IndexRequest, text) if text else IndexRequest()
    entries = service.catalog.entries()
    return JsonResponse(
        [_line(item) for item in entries if item.refusal is None or not asked.ready]
    )


@router.post("/v2/repository/models/{name}/load", **LOAD)
async def load(request: Request, name: str) -> Response:
    """Serve an adapter, read anew from the store; or the file that comes along, published."""
    service = service_of(request)
    # In base64 four bytes carry three.
    limit = service.settings.max_upload_bytes * 4 // 3 + _AROUND_BYTES
    text, _ = await read_parts(request, limit)
    data = await asyncio.to_thread(_file_of, text, service.settings.max_upload_bytes)
    if data is None:
        await service.catalog.reload(name)
    else:
        await publish(service, name, data, Condition())
    return JsonResponse({"name": name, "load": True})


@router.post("/v2/repository/models/{name}/unload", **UNLOAD)
async def unload(request: Request, name: str) -> Response:
    """Serve an adapter no longer; the store keeps it. Requests in flight are answered.

    When this returns, no later request is answered by it.
    """
    service = service_of(request)
    text, _ = await read_parts(request, service.settings.max_body_bytes)
    if text:
        parsed(LoadRequest, text)
    await service.catalog.unload(name)
    return JsonResponse({"name": name, "unload": True})


def _line(entry: CatalogEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "version": entry.current or "",
        "state": "READY" if entry.refusal is None else "UNAVAILABLE",
        "reason": "" if entry.refusal is None else str(entry.refusal),
    }


def _file_of(text: bytes, limit: int) -> bytes | None:
    """The file of a load request, if it has one.

    Raises:
        MalformedRequest, InvalidRequest: not such a request.
        TooLarge: a file over `limit` bytes.
    """
    if sum(map(text.count, _MARKS)) > _MOST_MARKS:
        raise InvalidRequest(["body: far more fields than a load request has"])
    parameters = (parsed(LoadRequest, text) if text else LoadRequest()).parameters or {}
    paths = [path for path in parameters if path.startswith(_FILE)]
    if not paths:
        if "config" in parameters:
            raise InvalidRequest(["parameters.config: an adapter has none that could be replaced"])
        return None
    if len(paths) > 1:
        raise InvalidRequest([f"parameters: {len(paths)} files, an adapter is one"])
    content = parameters[paths[0]]
    try:
        data = base64.b64decode(content, validate=True) if isinstance(content, str) else None
    except ValueError:
        data = None
    if data is None:
        raise InvalidRequest([f"parameters.{paths[0][:64]}: not base64"])
    if len(data) > limit:
        raise TooLarge(f"the file is larger than {limit} bytes")
    return data
