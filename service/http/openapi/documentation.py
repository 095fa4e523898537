"""The OpenAPI page: what each route takes and answers, with real examples. Knows no request.

Bodies are read and answers are built by hand on the way through; here the models that tests hold
them against become the documentation.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from adapters import errors as adapter_errors
from service import errors
from service.http.errors import ERRORS
from service.http.openapi.examples import (
    DETAIL,
    HEALTHY,
    LIST_PAGE,
    NOT_READY,
    PREDICT_REQUESTS,
    PREDICT_RESPONSE,
    PUBLISHED,
    RAISED,
    ROLLBACKS,
    error_body,
)
from service.http.openapi.schemas import (
    AdapterDetail,
    AdapterList,
    ErrorResponse,
    Health,
    PredictRequest,
    PredictResponse,
    PublishedAdapter,
    RollbackRequest,
)

_MODELS: tuple[type[BaseModel], ...] = (PredictRequest, RollbackRequest)
_FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FORM = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["name", "file"],
            "properties": {
                "name": {"type": "string"},
                "file": {"type": "string", "format": "binary"},
            },
        }
    }
}
_CONDITIONS = [
    {
        "name": name,
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": meaning,
    }
    for name, meaning in (
        (
            "If-Match",
            "Only if this revision, in quotes, is the current one; `*`: only if there is one.",
        ),
        ("If-None-Match", "`*`: only if the name is new."),
    )
]
_ANYWHERE = (errors.Unauthorized, errors.NotReady, errors.EngineUnavailable)
_RESOLVING = (adapter_errors.UnknownAdapter, adapter_errors.UnknownRevision)
_CHANGING = (*_ANYWHERE, errors.Forbidden, adapter_errors.RevisionConflict)
_UPLOADING = (
    *_CHANGING,
    adapter_errors.IncompatibleAdapter,
    adapter_errors.InvalidAdapter,
    adapter_errors.InvalidName,
    errors.TooLarge,
    errors.Overloaded,
)


def _answers(
    model: type[BaseModel] | None,
    example: Mapping[str, Any] | None,
    *refused: type[Exception],
    status: int = 200,
    description: str = "As asked",
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its success, and every error that it names."""
    success: dict[str, Any] = {"description": description}
    if model is not None:
        success |= {"model": model, "content": {"application/json": {"example": example}}}
    found: dict[int | str, dict[str, Any]] = {status: success}
    for error in RAISED:
        if type(error) not in refused:
            continue
        kind = ERRORS[type(error)]
        entry = found.setdefault(
            kind.status,
            {
                "model": ErrorResponse,
                "description": "",
                "content": {"application/json": {"examples": {}}},
            },
        )
        entry["description"] = f"{entry['description']} `{kind.type}`: {kind.meaning}".strip()
        examples = entry["content"]["application/json"]["examples"]
        examples[kind.type] = {"summary": kind.meaning, "value": error_body(error)}
    return found


def _json_body(model: type[BaseModel], examples: Mapping[str, Any]) -> dict[str, Any]:
    content = {
        "schema": {"$ref": f"#/components/schemas/{model.__name__}"},
        "examples": {name: {"value": value} for name, value in examples.items()},
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _upload_answers() -> dict[int | str, dict[str, Any]]:
    found = _answers(
        PublishedAdapter, PUBLISHED, *_UPLOADING, description="The same bytes, or replaced"
    )
    created = {"model": PublishedAdapter, "description": "The name is new"}
    example = PUBLISHED | {"created": True}
    return {201: created | {"content": {"application/json": {"example": example}}}, **found}


def _body(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "requestBody": {"required": True, "content": content},
        "parameters": _CONDITIONS,
    }


# Keyword arguments of the routes' decorators.
PREDICT: dict[str, Any] = {
    "tags": ["predict"],
    "openapi_extra": _json_body(PredictRequest, PREDICT_REQUESTS),
    "responses": _answers(
        PredictResponse,
        PREDICT_RESPONSE,
        *_ANYWHERE,
        *_RESOLVING,
        errors.MalformedRequest,
        errors.TooLarge,
        errors.InvalidRequest,
        errors.Overloaded,
        errors.InferenceFailed,
        errors.AdapterLoadFailed,
        errors.DeadlineExceeded,
        adapter_errors.IncompatibleAdapter,
        adapter_errors.UnloadedAdapter,
        adapter_errors.DamagedFile,
    ),
}
PUT: dict[str, Any] = {
    "tags": ["adapters"],
    "openapi_extra": _body(_FILE),
    "responses": _upload_answers(),
}
POST: dict[str, Any] = {
    "tags": ["adapters"],
    "openapi_extra": _body(_FORM),
    "responses": _upload_answers(),
}
LIST: dict[str, Any] = {
    "tags": ["adapters"],
    "responses": _answers(
        AdapterList,
        LIST_PAGE,
        *_ANYWHERE,
        errors.InvalidRequest,
    ),
}
SHOW: dict[str, Any] = {
    "tags": ["adapters"],
    "responses": _answers(
        AdapterDetail,
        DETAIL,
        *_ANYWHERE,
        adapter_errors.UnknownAdapter,
    ),
}
DOWNLOAD: dict[str, Any] = {
    "tags": ["adapters"],
    "responses": {
        **_answers(None, None, *_ANYWHERE, *_RESOLVING, adapter_errors.DamagedFile),
        200: {"description": "The file", "content": _FILE},
        304: {"description": "`If-None-Match` names this revision"},
    },
}
ROLLBACK: dict[str, Any] = {
    "tags": ["adapters"],
    "openapi_extra": {
        **_json_body(RollbackRequest, ROLLBACKS),
        "parameters": _CONDITIONS[:1],
    },
    "responses": _answers(
        PublishedAdapter,
        PUBLISHED,
        *_CHANGING,
        *_RESOLVING,
        errors.InvalidRequest,
        adapter_errors.IncompatibleAdapter,
        adapter_errors.UnloadedAdapter,
        adapter_errors.DamagedFile,
    ),
}
DELETE: dict[str, Any] = {
    "tags": ["adapters"],
    "status_code": 204,
    "openapi_extra": {"parameters": _CONDITIONS[:1]},
    "responses": _answers(
        None,
        None,
        *_CHANGING,
        adapter_errors.UnknownAdapter,
        status=204,
        description="Gone",
    ),
}
_PROBE: dict[int | str, dict[str, Any]] = {
    503: {
        "model": Health,
        "description": "Not so, and why",
        "content": {"application/json": {"example": NOT_READY}},
    }
}
HEALTHZ: dict[str, Any] = {"tags": ["operations"], "responses": _answers(Health, HEALTHY) | _PROBE}
READYZ = HEALTHZ
METRICS: dict[str, Any] = {
    "tags": ["operations"],
    "responses": {200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
}


def error_table() -> str:
    """Every error of the API, as Markdown."""
    lines = ["| Status | Type | Meaning |", "|---|---|---|"]
    rows = {(kind.status, kind.type): kind.meaning for kind in ERRORS.values()}
    lines += [f"| {status} | `{name}` | {meaning} |" for (status, name), meaning in rows.items()]
    return "\n".join(lines) + "\n"


def describe(app: FastAPI) -> None:
    """Make the app's OpenAPI document hold the models of bodies that are read by hand."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in _MODELS],
                ref_template="#/components/schemas/{model}",
            )
            schema["components"]["schemas"].update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # how FastAPI documents extending it
