"""What an upload would come to: the answer of `?dry_run=true`."""

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapters.difference import difference
from adapters.format.spec import AdapterSpec
from adapters.format.uploads import ReceivedFile
from service.catalog.entry import CatalogEntry, Condition, Inspection
from service.http.bodies import JsonResponse
from service.http.errors import refusal_of
from service.http.lifecycle import service_of

_DISK = "whether the disk has room for the file"
# To ask them, the file would have to be stored and a change begun, which waits for all of them.
_REPLICAS = "whether the other replicas can serve it: the upload asks each of them"


async def reported(
    request: Request,
    name: str,
    file: ReceivedFile,
    condition: Condition,
    *,
    force: bool,
    stage: bool,
) -> Response:
    """Check a file as an upload would, and answer with a `schemas.UploadReport`.

    Raises:
        AdapterError: what an upload would be refused for, beside its file: `CatalogView.inspect`.
    """
    catalog = service_of(request).catalog
    inspection = await catalog.inspect(name, file, condition, force=force, stage=stage)
    entry = catalog.find(name)
    serving = None if entry is None else entry.current
    headers = {"ETag": f'"{serving}"'} if serving else {}
    content = _content(name, file, inspection, entry)
    is_shared = service_of(request).settings.adapter_store is not None
    content["unchecked"] = [_DISK, _REPLICAS] if is_shared else [_DISK]
    return JsonResponse(content, headers=headers)


def declared(spec: AdapterSpec | None) -> dict[str, Any]:
    """What lists show of a file, as far as it can be read."""
    return {
        "labels": list(spec.labels) if spec else [],
        "method": spec.method if spec else None,
        "backbone": spec.backbone.name if spec else None,
        "prompt_length": spec.prompt_length if spec else None,
        "created": spec.provenance.created if spec else None,
    }


def _content(
    name: str, file: ReceivedFile, inspection: Inspection, entry: CatalogEntry | None
) -> dict[str, Any]:
    before = None if entry is None else entry.spec
    spec, error = inspection.spec, None
    if inspection.refusal is not None:
        refusal = refusal_of(inspection.refusal)
        error = {
            "status": refusal.kind.status,
            "type": refusal.kind.type,
            "message": refusal.message,
            "details": list(refusal.details),
        }
    changes = None
    if entry is not None and before is not None and spec is not None:
        found = difference(before, spec, size_before=entry.size, size_after=file.size)
        changes = asdict(found)
    return {
        "name": name,
        "accepted": error is None,
        "error": error,
        "serving": None if entry is None else entry.current,
        "adapter": {
            "revision": file.revision,
            "size": file.size,
            **declared(spec),
            "spec": None if spec is None else spec.model_dump(mode="json"),
        },
        "difference": changes,
    }
