"""/v1/adapters: publish, list, show, download, roll back, delete."""

import asyncio
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, Query
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    MalformedRangeHeader,
    RangeNotSatisfiable,
    Response,
)
from starlette.types import Receive, Scope, Send

from adapters.difference import difference
from adapters.errors import AdapterError, DamagedFile, StoreFailed
from adapters.format.events import arrival
from adapters.format.store import Revision, file_of, verified_bytes, verified_file
from adapters.format.uploads import ReceivedFile
from service.catalog.entry import CatalogEntry, ChangeResult, Condition, Wait
from service.client.types import AdapterState
from service.engine.observer import UploadOutcome
from service.errors import RequestError
from service.http import uploads
from service.http.bodies import (
    MAX_SHOWN_CHARACTERS,
    JsonResponse,
    content_type,
    read_as,
    refuse_encoded,
)
from service.http.etags import is_known, tags_of
from service.http.lifecycle import origin_of, service_of
from service.http.openapi.documentation import (
    DELETE,
    DELETE_REVISION,
    DIFFERENCE,
    DOWNLOAD,
    LIST,
    POST,
    PUT,
    ROLLBACK,
    SHOW,
)
from service.http.openapi.schemas import RollbackRequest
from service.http.queries import refuse_unknown_query
from service.http.upload_report import declared, reported

# A file up to this size is read once, and sent from memory.
_SMALL_BYTES = 4 * 2**20

router = APIRouter(dependencies=[Depends(refuse_unknown_query)])


class _OpenedFile(FileResponse):
    """Sends a file that is open already, since its name may be removed before it is sent.

    Raises when it is sent:
        HTTPException: 416, none of it is in a range that the request names.
    """

    def __init__(self, file: BinaryIO, **options: Any) -> None:
        descriptor = file.fileno()
        super().__init__(f"/dev/fd/{descriptor}", stat_result=os.fstat(descriptor), **options)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        """The base class would answer faults as plain text."""
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            # As RFC 9110 says of units that a server does not know: the whole file.
            return []
        except RangeNotSatisfiable:
            raise HTTPException(
                416,
                f"Range is {http_range[:MAX_SHOWN_CHARACTERS]}, the file has {file_size} bytes",
                headers={"Content-Range": f"bytes */{file_size}"},
            ) from None


@router.put("/v1/adapters/{name}", **PUT)
async def put_adapter(
    request: Request,
    name: str,
    force: bool = False,
    stage: bool = False,
    wait: Wait = "all",
    dry_run: bool = False,
) -> Response:
    """Publish an adapter file under a name.

    Once this has returned, the old revision answers no further requests. A file with other labels
    or another task than the current one needs `force`, or `If-Match` with its revision. With
    `stage` the current revision stays: the new one can be pinned, and tried on some of the texts.
    Where several replicas share a store, `wait` says which of them it waits for. With `dry_run` the
    file is checked in full and nothing is stored: the answer says what would happen.
    """
    service = service_of(request)
    if content_type(request).startswith("multipart/"):
        raise HTTPException(
            415, "this is a form: use POST /v1/adapters, or send the file itself (curl -T FILE)"
        )
    refuse_encoded(request)
    condition = condition_of(request)
    service.catalog.check(name, condition, stage=stage)
    async with uploads.receive(request, service.settings.max_upload_bytes) as file:
        if dry_run:
            return await reported(request, name, file, condition, force=force, stage=stage)
        done = await publish(request, name, file, condition, force=force, stage=stage, wait=wait)
        return published(name, done)


@router.post("/v1/adapters", **POST)
async def post_adapter(
    request: Request,
    force: bool = False,
    stage: bool = False,
    wait: Wait = "all",
    dry_run: bool = False,
) -> Response:
    """Publish an adapter file from a form, for browsers and `curl -F`."""
    kind = content_type(request) or "none"
    if kind != "multipart/form-data":
        raise HTTPException(415, f"Content-Type is {kind}, expected multipart/form-data")
    refuse_encoded(request)
    limit = service_of(request).settings.max_upload_bytes
    async with uploads.receive_form(request, limit) as (name, file):
        condition = condition_of(request)
        if dry_run:
            return await reported(request, name, file, condition, force=force, stage=stage)
        done = await publish(request, name, file, condition, force=force, stage=stage, wait=wait)
        return published(name, done)


@router.get("/v1/adapters", **LIST)
async def list_adapters(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    search: Annotated[
        str, Query(max_length=64, description="Only names that contain every one of these words.")
    ] = "",
    state: Annotated[AdapterState | None, Query(description="Only adapters in this state.")] = None,
) -> Response:
    """All adapters by name, a page at a time.

    If names appear or go between two pages, no other name is left out or repeated.
    """
    # Names have no capitals.
    words = search.lower().split()
    found = [
        entry
        for entry in service_of(request).catalog.entries()
        if all(word in entry.name for word in words) and state in (None, entry.state)
    ]
    rest = found if cursor is None else [entry for entry in found if entry.name > cursor]
    page = rest[:limit]
    content = {
        "adapters": [_summary(entry) for entry in page],
        "next_cursor": page[-1].name if len(rest) > limit else None,
        "total": len(found),
    }
    return JsonResponse(content)


@router.get("/v1/adapters/{name}", **SHOW)
async def show_adapter(request: Request, name: str) -> Response:
    """One adapter: its spec, its revisions with their history, and whether it can be served."""
    entry = service_of(request).catalog.entry(name)
    detail = _summary(entry) | {
        "revisions": [stored.revision for stored in entry.revisions],
        "versions": [_version(entry, stored) for stored in entry.revisions],
        "events": [asdict(event) | {"who": event.who or None} for event in entry.events],
        "spec": entry.spec.model_dump(mode="json") if entry.spec else None,
    }
    return JsonResponse(detail, headers=etag(entry.current))


@router.get("/v1/adapters/{name}/difference", **DIFFERENCE)
async def show_difference(
    request: Request,
    name: str,
    before: Annotated[str | None, Query(max_length=64)] = None,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """What differs between two stored revisions, each given by its first characters. Without one
    it is the current revision."""
    entry = service_of(request).catalog.entry(name)
    old, new = (
        entry.require_current() if prefix is None else entry.revision(prefix)
        for prefix in (before, after)
    )
    sizes = {stored.revision: stored.size for stored in entry.revisions}
    found = difference(
        entry.readable(old),
        entry.readable(new),
        size_before=sizes.get(old),
        size_after=sizes.get(new),
    )
    return JsonResponse({"name": name, "before": old, "after": new, "difference": asdict(found)})


@router.get("/v1/adapters/{name}/file", **DOWNLOAD)
async def download_adapter(
    request: Request, name: str, revision: Annotated[str | None, Query(max_length=64)] = None
) -> Response:
    """The adapter file as it was uploaded; its sha256 is its revision.

    It is hashed before it is sent, so other bytes are never sent as this revision.
    """
    service = service_of(request)
    revision, _ = service.catalog.path(name, revision)
    headers = etag(revision)
    if is_known(request, revision):
        return Response(status_code=304, headers=headers)
    filename = f"{name}-{revision[:12]}.safetensors"
    data: bytes | None = None
    file: BinaryIO | None = None
    try:
        if "range" not in request.headers:
            data = await asyncio.to_thread(_small_file, service.catalog.root, name, revision)
        if data is None:
            # Read twice, since its hash is known only after its last byte; the second time from
            # the system's cache.
            file = await asyncio.to_thread(_verified_open, service.catalog.root, name, revision)
    except DamagedFile:
        # Marks it as damaged everywhere, and raises unless it was repaired meanwhile.
        await service.catalog.rehash(name, revision)
        file = await asyncio.to_thread(_verified_open, service.catalog.root, name, revision)
    if file is None:
        headers["Content-Disposition"] = f'attachment; filename="{filename}"'
        return Response(data, headers=headers, media_type="application/octet-stream")
    return _OpenedFile(
        file, headers=headers, media_type="application/octet-stream", filename=filename
    )


@router.post("/v1/adapters/{name}/rollback", **ROLLBACK)
async def roll_back_adapter(request: Request, name: str, wait: Wait = "all") -> Response:
    """Serve an earlier revision again. Rolling back twice without naming one undoes itself."""
    service = service_of(request)
    prefix = (await read_as(RollbackRequest, request)).revision
    before = service.catalog.entry(name).current
    revision = await service.catalog.rollback(
        name, prefix, condition_of(request), wait=wait, by=origin_of(request)
    )
    return published(name, ChangeResult(revision, created=False, changed=revision != before))


@router.delete("/v1/adapters/{name}", **DELETE)
async def delete_adapter(request: Request, name: str, wait: Wait = "all") -> Response:
    """Delete a name and all its revisions. An adapter of the zoo comes back at the next start."""
    catalog = service_of(request).catalog
    await catalog.delete(name, condition_of(request), wait=wait, by=origin_of(request))
    return Response(status_code=204)


@router.delete("/v1/adapters/{name}/revisions/{revision}", **DELETE_REVISION)
async def delete_revision(
    request: Request, name: str, revision: str, wait: Wait = "all"
) -> Response:
    """Delete one revision that is not the current one, given by its first characters."""
    catalog = service_of(request).catalog
    await catalog.delete_revision(
        name, revision, condition_of(request), wait=wait, by=origin_of(request)
    )
    return Response(status_code=204)


async def publish(
    request: Request,
    name: str,
    content: bytes | ReceivedFile,
    condition: Condition,
    *,
    force: bool = False,
    stage: bool = False,
    wait: Wait = "all",
) -> ChangeResult:
    """Publish an adapter file and count the upload's outcome; raises as `CatalogView.publish`."""
    outcome: UploadOutcome = "failed"
    service = service_of(request)
    try:
        done = await service.catalog.publish(
            name, content, condition, force=force, stage=stage, wait=wait, by=origin_of(request)
        )
        if stage:
            outcome = "staged"
        elif done.created:
            outcome = "created"
        else:
            outcome = "replaced" if done.changed else "unchanged"
    except (AdapterError, RequestError) as error:
        outcome = "failed" if isinstance(error, (DamagedFile, StoreFailed)) else "refused"
        raise
    finally:
        service.metrics.uploaded(outcome)
    return done


def _small_file(root: Path, name: str, revision: str) -> bytes | None:
    """The verified bytes of a file that is small enough to be sent from memory, else None."""
    try:
        size = file_of(root, name, revision).stat().st_size
    except OSError:
        return None
    return verified_bytes(root, name, revision) if size <= _SMALL_BYTES else None


def _verified_open(root: Path, name: str, revision: str) -> BinaryIO:
    """A stored file that was hashed just now; raises as `verified_file`."""
    try:
        file = file_of(root, name, revision).open("rb")
    except OSError:
        # Says what is wrong with it.
        file = verified_file(root, name, revision).open("rb")
    try:
        verified_file(root, name, revision)
    except BaseException:
        file.close()
        raise
    return file


def published(name: str, done: ChangeResult) -> Response:
    """What an upload or a rollback is answered."""
    content = {
        "name": name,
        "revision": done.revision,
        "created": done.created,
        "changed": done.changed,
    }
    status = 201 if done.created else 200
    return JsonResponse(content, status_code=status, headers=etag(done.revision))


def condition_of(request: Request) -> Condition:
    """The condition that a request's `If-Match` and `If-None-Match` state."""
    match = tags_of(request, "if-match")
    none_match = tags_of(request, "if-none-match", weak=True)
    return Condition(match or None, none_match or None)


def etag(revision: str | None) -> dict[str, str]:
    """The header that names the current revision, if there is one."""
    return {"ETag": f'"{revision}"'} if revision else {}


def _summary(entry: CatalogEntry) -> dict[str, Any]:
    """The shape of `schemas.AdapterSummary`."""
    return {
        "name": entry.name,
        "revision": entry.current,
        "state": entry.state,
        "reason": None if entry.refusal is None else str(entry.refusal),
        "size": entry.size,
        **declared(entry.spec),
    }


def _version(entry: CatalogEntry, stored: Revision) -> dict[str, Any]:
    """The shape of `schemas.Version`."""
    revision, spec = stored.revision, entry.specs.get(stored.revision)
    refusal, came = entry.unusable.get(revision), arrival(entry.events, revision)
    return {
        "revision": revision,
        "stored": stored.stored.isoformat(timespec="seconds"),
        "size": stored.size,
        "method": spec.method if spec else None,
        "reason": None if refusal is None else str(refusal),
        "who": came.who or None if came else None,
    }
