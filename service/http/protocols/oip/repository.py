"""Open Inference Protocol V2: the model repository, load and unload.

KServe's and Triton's clients send different bodies here, or none.
"""

import asyncio
import base64
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.catalog.entry import CatalogEntry, Condition, Wait
from service.errors import InvalidRequest, TooLarge
from service.http.adapters import publish
from service.http.bodies import JsonResponse, parse_json, validated
from service.http.lifecycle import origin_of, service_of
from service.http.openapi.compatible import OIP_INDEX, OIP_LOAD, OIP_UNLOAD
from service.http.protocols.oip.tensors import IndexRequest, LoadRequest, read_parts

router = APIRouter()

# The JSON around a file may have this much.
_AROUND_BYTES = 64 * 1024
_FILE = "file:"
# JSON delimiters are counted before parsing: base64 has none of them, and a body as large as a file
# could otherwise allocate millions of objects.
_DELIMITERS = (b",", b"[", b"{")
_MAX_DELIMITERS = 10_000


@router.post("/v2/repository/index", **OIP_INDEX)
async def index(request: Request) -> Response:
    """Every adapter; the reason if it cannot be served."""
    service = service_of(request)
    text, _ = await read_parts(request, service.settings.max_body_bytes)
    ready_only = bool(text) and validated(IndexRequest, parse_json(text)).ready
    entries = service.catalog.entries()
    return JsonResponse(
        [_line(entry) for entry in entries if entry.refusal is None or not ready_only]
    )


@router.post("/v2/repository/models/{name}/load", **OIP_LOAD)
async def load(request: Request, name: str, force: bool = False, wait: Wait = "all") -> Response:
    """Serve an adapter: read from the store again, or published from a file in the request.

    Without a file this is for the replica that is asked alone, and `wait` says nothing.
    """
    service = service_of(request)
    # Base64 takes four bytes for three.
    limit = service.settings.max_upload_bytes * 4 // 3 + _AROUND_BYTES
    text, _ = await read_parts(request, limit)
    data = await asyncio.to_thread(_file_of, text, service.settings.max_upload_bytes)
    if data is None:
        await service.catalog.reload(name, by=origin_of(request))
    else:
        await publish(request, name, data, Condition(), force=force, wait=wait)
    return JsonResponse({"name": name, "load": True})


@router.post("/v2/repository/models/{name}/unload", **OIP_UNLOAD)
async def unload(request: Request, name: str) -> Response:
    """Stop serving an adapter; the store keeps it. Requests in flight are answered.

    Once this has returned, the adapter answers no further requests. Where several replicas share a
    store, this is for the one that is asked alone.
    """
    service = service_of(request)
    text, _ = await read_parts(request, service.settings.max_body_bytes)
    if text:
        validated(LoadRequest, parse_json(text))
    await service.catalog.unload(name, by=origin_of(request))
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
        MalformedRequest, InvalidRequest: not a valid load request.
        TooLarge: a file over `limit` bytes.
    """
    if sum(map(text.count, _DELIMITERS)) > _MAX_DELIMITERS:
        raise InvalidRequest(["body: far more fields than a load request has"])
    parameters = (
        validated(LoadRequest, parse_json(text)) if text else LoadRequest()
    ).parameters or {}
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
