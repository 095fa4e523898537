"""The OpenAPI document: what each route takes and answers, with examples of both.

Request bodies are read and answers are built by hand; here the models that tests check them against
become the documentation. `entry` describes one route; below it are the entries of this project's
own routes, and `compatible` has those of other protocols.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.http.errors import ERRORS, kind_of
from service.http.openapi import examples
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

# By status, as FastAPI takes them.
Responses = dict[int | str, dict[str, Any]]


def entry(
    tag: str,
    *,
    request: Mapping[str, Any] | None = None,
    parameters: Sequence[Mapping[str, Any]] = (),
    status: int = 200,
    description: str = "As asked",
    answer: Any = None,
    model: type[BaseModel] | None = None,
    errors: Responses | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a route's decorator.

    Args:
        request: the body by content type, see `json_body`; None for a route without a body.
        answer: an example of the successful answer; None for an empty body.
    """
    responses = {status: response(description, answer, model), **(errors or {})}
    route: dict[str, Any] = {"tags": [tag], "responses": responses}
    if status != 200:
        route["status_code"] = status
    extra: dict[str, Any] = {"parameters": list(parameters)} if parameters else {}
    if request is not None:
        extra["requestBody"] = {"required": True, "content": request}
    return route | ({"openapi_extra": extra} if extra else {})


def response(
    description: str, example: Any = None, model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """One of a route's responses; without an example its body is empty."""
    content = {} if example is None else {"content": {"application/json": {"example": example}}}
    return {"description": description, **content} | ({"model": model} if model else {})


def json_body(
    by_name: Mapping[str, Any], *, model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """A JSON body with its examples by name."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"} if model else {"type": "object"}
    values = {name: {"value": value} for name, value in by_name.items()}
    return {"application/json": {"schema": schema, "examples": values}}


def describe(app: FastAPI) -> None:
    """Add the models of bodies that are read by hand to the app's OpenAPI document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, definitions = models_json_schema(
                [(PredictRequest, "validation"), (RollbackRequest, "validation")],
                ref_template="#/components/schemas/{model}",
            )
            schema["components"]["schemas"].update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # how FastAPI documents extending it


def error_table() -> str:
    """The table of errors in docs/api.md."""
    lines = ["| Status | Type | Meaning |", "|---|---|---|"]
    rows = {(kind.status, kind.type): kind.meaning for kind in ERRORS.values()}
    lines += [f"| {status} | `{name}` | {meaning} |" for (status, name), meaning in rows.items()]
    return "\n".join(lines) + "\n"


def _refusals(*types: str) -> Responses:
    """The errors that a route documents, one example of each."""
    responses: Responses = {}
    for error in examples.ERRORS:
        kind = kind_of(error)
        if kind.type not in types:
            continue
        content: dict[str, Any] = {"application/json": {"examples": {}}}
        empty = response("", model=ErrorResponse) | {"content": content}
        refusal = responses.setdefault(kind.status, empty)
        refusal["description"] = f"{refusal['description']} `{kind.type}`: {kind.meaning}".strip()
        example = {"summary": kind.meaning, "value": examples.error_body(error)}
        refusal["content"]["application/json"]["examples"][kind.type] = example
    return responses


def _condition(name: str, meaning: str) -> dict[str, Any]:
    parameter = {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}
    return parameter | {"description": meaning}


_FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FORM_FIELDS = {"name": {"type": "string"}, "file": {"type": "string", "format": "binary"}}
_FORM = {
    "multipart/form-data": {
        "schema": {"type": "object", "required": list(_FORM_FIELDS), "properties": _FORM_FIELDS}
    }
}
_IF_MATCH = _condition(
    "If-Match", "Only if this revision, in quotes, is the current one; `*`: only if there is one."
)
_IF_NONE_MATCH = _condition("If-None-Match", "`*`: only if the name is new.")

_ANYWHERE = ("unauthorized", "not_ready", "unavailable")
_CHANGING = (*_ANYWHERE, "forbidden", "revision_conflict", "store_failed")
_RESOLVING = ("adapter_not_found", "revision_not_found")
_SERVING = (*_RESOLVING, "adapter_incompatible", "adapter_unloaded", "adapter_damaged")


def _upload(request: Mapping[str, Any]) -> dict[str, Any]:
    created = response("The name is new", examples.PUBLISHED | {"created": True}, PublishedAdapter)
    refusals = _refusals(
        *_CHANGING,
        "adapter_incompatible",
        "replacement_not_forced",
        "adapter_invalid",
        "adapter_name_invalid",
        "too_large",
        "overloaded",
    )
    return entry(
        "adapters",
        request=request,
        parameters=(_IF_MATCH, _IF_NONE_MATCH),
        description="The same bytes, or replaced",
        answer=examples.PUBLISHED,
        model=PublishedAdapter,
        errors={201: created, **refusals},
    )


PREDICT = entry(
    "predict",
    request=json_body(examples.PREDICT_REQUESTS, model=PredictRequest),
    answer=examples.PREDICT_RESPONSE,
    model=PredictResponse,
    errors=_refusals(
        *_ANYWHERE,
        *_SERVING,
        "malformed_request",
        "too_large",
        "invalid_request",
        "overloaded",
        "inference_failed",
        "adapter_load_failed",
        "deadline_exceeded",
    ),
)
PUT = _upload(_FILE)
POST = _upload(_FORM)
LIST = entry(
    "adapters",
    answer=examples.LIST_PAGE,
    model=AdapterList,
    errors=_refusals(*_ANYWHERE, "invalid_request"),
)
SHOW = entry(
    "adapters",
    answer=examples.DETAIL,
    model=AdapterDetail,
    errors=_refusals(*_ANYWHERE, "adapter_not_found"),
)
DOWNLOAD = entry(
    "adapters",
    errors={
        **_refusals(*_ANYWHERE, *_RESOLVING, "adapter_damaged", "store_failed"),
        200: {"description": "The file", "content": _FILE},
        304: response("`If-None-Match` names this revision"),
    },
)
ROLLBACK = entry(
    "adapters",
    request=json_body(examples.ROLLBACKS, model=RollbackRequest),
    parameters=(_IF_MATCH,),
    answer=examples.PUBLISHED,
    model=PublishedAdapter,
    errors=_refusals(*_CHANGING, *_SERVING, "invalid_request"),
)
DELETE_REVISION = entry(
    "adapters",
    parameters=(_IF_MATCH,),
    status=204,
    description="Gone",
    errors=_refusals(*_CHANGING, *_RESOLVING, "revision_current"),
)
DELETE = entry(
    "adapters",
    parameters=(_IF_MATCH,),
    status=204,
    description="Gone",
    errors=_refusals(*_CHANGING, "adapter_not_found"),
)
PROBE = entry(
    "operations",
    answer=examples.HEALTHY,
    model=Health,
    errors={503: response("Not so, and why", examples.NOT_READY, Health)},
)
METRICS = entry(
    "operations",
    errors={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
)
