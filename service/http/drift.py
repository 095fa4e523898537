"""/v1/adapters/{name}/drift and /uncertain: what has changed since training, what to label next."""

import asyncio
import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from service.drift.interface import DriftView, UncertainText
from service.errors import ServiceError, TextsNotKept
from service.http.bodies import JsonResponse
from service.http.lifecycle import Service, origin_of, service_of
from service.http.openapi.documentation import DRIFT, FORGET_UNCERTAIN, UNCERTAIN
from service.http.queries import refuse_unknown_query
from service.records.audit import Outcome

logger = logging.getLogger(__name__)

router = APIRouter(dependencies=[Depends(refuse_unknown_query)])


@router.get("/v1/adapters/{name}/drift", **DRIFT)
async def show_drift(
    request: Request, name: str, revision: Annotated[str | None, Query(max_length=64)] = None
) -> Response:
    """How far an adapter's last texts are from those of its training: label, confidence, length,
    unknown tokens. Of the current revision, or of one that is tried beside it."""
    service = service_of(request)
    entry = service.catalog.entry(name)
    key = entry.require_current() if revision is None else entry.revision(revision)
    return JsonResponse(asdict(await service.drift.report(name, key)))


@router.get("/v1/adapters/{name}/uncertain", **UNCERTAIN)
async def list_uncertain(
    request: Request, name: str, format: Literal["json", "jsonl", "csv"] = "json"
) -> Response:
    """The texts of which the adapter is least certain, to be labelled: as one object, as lines of
    JSON, or as CSV with an empty column for the label."""
    service = service_of(request)
    texts = await _kept(service, name).uncertain(name)
    facts = _facts(request, name) | {"texts": len(texts), "format": format}
    await asyncio.to_thread(service.audit.disclosed, "texts.read", facts)
    _log(request, "read", name, len(texts))
    headers = {"Cache-Control": "no-store"}
    if format == "json":
        content = {"adapter": name, "texts": [_row(text) for text in texts]}
        return JsonResponse(content, headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="{name}-uncertain.{format}"'
    if format == "csv":
        return Response(_csv(texts), headers=headers, media_type="text/csv")
    return Response(_jsonl(texts), headers=headers, media_type="application/x-ndjson")


@router.delete("/v1/adapters/{name}/uncertain", **FORGET_UNCERTAIN)
async def forget_uncertain(request: Request, name: str) -> Response:
    """Forget these texts at once. New ones are kept as before."""
    service = service_of(request)
    kept, facts = _kept(service, name), _facts(request, name)
    change = await asyncio.to_thread(service.audit.begun, "texts.forget", facts, makes_room=True)
    try:
        removed = await kept.forget(name)
    except ServiceError as error:
        ended = partial(service.audit.ended, "texts.forget", change, facts, "failed", str(error))
        await asyncio.to_thread(ended)
        raise
    facts |= {"texts": removed}
    outcome: Outcome = "done" if removed else "unchanged"
    await asyncio.to_thread(service.audit.ended, "texts.forget", change, facts, outcome)
    _log(request, "removed", name, removed)
    return Response(status_code=204)


def _facts(request: Request, name: str) -> dict[str, str | int]:
    """Who asks for what, for the audit log."""
    who, request_id, address = origin_of(request)
    return {"who": who, "address": address, "request_id": request_id, "adapter": name}


def _log(request: Request, what: str, name: str, texts: int) -> None:
    """Who has seen what others have sent."""
    client: str = request.scope.get("idspam.client", "")
    logger.info("kept texts %s name=%s texts=%d client=%s", what, name, texts, client or "-")


def _kept(service: Service, name: str) -> DriftView:
    """
    Raises:
        UnknownAdapter: there is none of this name.
        TextsNotKept: the settings say so.
    """
    service.catalog.entry(name)
    if not service.settings.uncertain_texts:
        raise TextsNotKept
    return service.drift


def _jsonl(texts: Sequence[UncertainText]) -> bytes:
    return b"".join(orjson.dumps(_row(text), option=orjson.OPT_APPEND_NEWLINE) for text in texts)


def _row(text: UncertainText) -> dict[str, Any]:
    """The shape of `schemas.UncertainText`."""
    return {
        "text": text.text,
        "text_pair": text.text_pair,
        "answer": text.label,
        "certainty": text.certainty,
        "scores": [{"label": label, "score": score} for label, score in text.scores],
        "time": text.time,
        "revision": text.revision,
        "cut": text.cut,
    }


def _csv(texts: Sequence[UncertainText]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    paired = any(text.text_pair is not None for text in texts)
    pair = ["text_pair"] if paired else []
    writer.writerow(["text", *pair, "label", "answer", "certainty", "time", "revision", "cut"])
    for text in texts:
        writer.writerow(
            [
                text.text,
                *([text.text_pair or ""] if paired else []),
                "",
                text.label,
                text.certainty,
                text.time,
                text.revision,
                "yes" if text.cut else "no",
            ]
        )
    return file.getvalue().encode()
