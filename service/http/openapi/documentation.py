"""The OpenAPI document: what each route takes and answers, with examples of both.

Request bodies are read and answers are built by hand; here the models that tests check them against
become the documentation. `entry` describes one route; below it are the entries of this project's
own routes, and `compatible` has those of other protocols.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from adapters.errors import UnknownAdapter
from service.access.scopes import SCOPES, Need, needs
from service.http.errors import ERRORS, INTERNAL
from service.http.openapi import examples
from service.http.openapi.refusals import (
    BODY,
    CHANGE,
    FILE,
    GATE,
    INFERENCE,
    JSON_BODY,
    KEY,
    NAMED,
    ROLLOUT,
    SERVED,
    Responses,
    refusals,
)
from service.http.openapi.schemas import (
    AdapterDetail,
    AdapterList,
    DriftDetail,
    Health,
    PredictRequest,
    PredictResponse,
    PublishedAdapter,
    RevisionDifference,
    RollbackRequest,
    StreamError,
    StreamLine,
    StreamQuery,
    TrafficDetail,
    TrafficRequest,
    UncertainTexts,
    UploadAnswer,
)

_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "`Authorization: Bearer KEY`; docs/access.md says what each scope may do",
    },
    "key": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same key in a header of its own",
    },
}


def entry(
    tag: str,
    *,
    request: Mapping[str, Any] | None = None,
    optional: bool = False,
    parameters: Sequence[Mapping[str, Any]] = (),
    status: int = 200,
    description: str = "As asked",
    answer: Any = None,
    model: type[BaseModel] | None = None,
    schema: Mapping[str, Any] | None = None,
    errors: Responses | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a route's decorator.

    Args:
        request: the body by content type, see `json_body`; None for a route without a body.
        optional: the body may be left out.
        answer: an example of the successful answer; None for an empty body.
        model, schema: of the successful answer; a schema is written by hand.
    """
    success = response(description, answer, model)
    if schema is not None:
        success["content"]["application/json"]["schema"] = schema
    route: dict[str, Any] = {"tags": [tag], "responses": {status: success, **(errors or {})}}
    if answer is None:
        # Else FastAPI would document a JSON answer.
        route["response_class"] = Response
    if status != 200:
        route["status_code"] = status
    extra: dict[str, Any] = {"parameters": list(parameters)} if parameters else {}
    if request is not None:
        extra["requestBody"] = {"required": not optional, "content": request}
    return route | ({"openapi_extra": extra} if extra else {})


def response(
    description: str, example: Any = None, model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """One of a route's responses; without an example its body is empty."""
    content = {} if example is None else {"content": {"application/json": {"example": example}}}
    return {"description": description, **content} | ({"model": model} if model else {})


def json_body(
    by_name: Mapping[str, Any],
    *,
    model: type[BaseModel] | None = None,
    schema: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A JSON body with its examples by name, and the schema of a model or one written by hand."""
    if model is not None:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    values = {name: {"value": value} for name, value in by_name.items()}
    return {"application/json": {"schema": schema, "examples": values}}


def describe(app: FastAPI, *, has_keys: bool) -> None:
    """Complete the app's OpenAPI document: models of bodies that are read by hand, parameters, and
    which keys its routes need, if the service has keys."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, definitions = models_json_schema(
                [
                    *((model, "validation") for model in _REQUESTS),
                    (StreamError, "serialization"),
                ],
                ref_template="#/components/schemas/{model}",
            )
            components = schema["components"]["schemas"]
            components.update(definitions["$defs"])
            for name in _FRAMEWORK_MODELS:
                components.pop(name, None)
            schema["components"]["securitySchemes"] = _SCHEMES
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    _complete(path, operation)
                    if has_keys:
                        operation["security"] = _security(needs()[method.upper(), path])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # how FastAPI documents extending it


def _security(need: Need) -> list[dict[str, list[str]]]:
    """Either way of sending a key that has one of the scopes."""
    if need.is_open:
        return []
    # In the order of the documentation; any one of them is enough.
    choices: list[list[str]] = [[scope] for scope in SCOPES if scope in need.scopes] or [[]]
    return [{scheme: choice} for choice in choices for scheme in _SCHEMES]


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Correct what FastAPI writes about one operation."""
    # It documents its own error body for every route with a parameter; ours are of other shapes.
    if "HTTPValidationError" in str(operation["responses"].get("422")):
        del operation["responses"]["422"]
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            own = path.startswith("/v1/") or "/versions/" in path or "/repository/" in path
            pattern = _NAME if own else _REFERENCE
            is_name = parameter["name"] == "name"
            parameter["schema"] = pattern if is_name else _VERSION


def error_table() -> str:
    """The table of errors in docs/api.md."""
    lines = ["| Status | Type | Meaning |", "|---|---|---|"]
    rows = {(kind.status, kind.type): kind.meaning for kind in ERRORS.values()}
    lines += [f"| {status} | `{name}` | {meaning} |" for (status, name), meaning in rows.items()]
    return "\n".join(lines) + "\n"


def _condition(name: str, meaning: str) -> dict[str, Any]:
    parameter = {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}
    return parameter | {"description": meaning}


REQUEST_KEY = _condition(
    "X-Request-Key",
    "Of all inputs of the request: while the texts of an adapter are divided between two "
    "revisions, requests with the same key get the same one. Without it each input is its own key.",
)
# Bodies that are read by hand.
_REQUESTS = (PredictRequest, RollbackRequest, StreamLine, TrafficRequest)
# The models of FastAPI's own error bodies.
_FRAMEWORK_MODELS = ("HTTPValidationError", "ValidationError")
_NAME = {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"}
_REFERENCE = {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}(@[0-9a-f]{1,64})?$"}
_VERSION = {"type": "string", "pattern": "^[0-9a-f]{1,64}$"}

_BYTES = {"type": "string", "format": "binary"}
_FILE = {"application/octet-stream": {"schema": _BYTES}}
_FORM_FIELDS = {"name": _NAME, "file": _BYTES}
_FORM = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": list(_FORM_FIELDS),
            "properties": _FORM_FIELDS,
            "additionalProperties": False,
        }
    }
}
_IF_MATCH = _condition(
    "If-Match", "Only if this revision, in quotes, is the current one; `*`: only if there is one."
)
_IF_NONE_MATCH = _condition("If-None-Match", "`*`: only if the name is new.")


def _upload(request: Mapping[str, Any]) -> dict[str, Any]:
    created = response("The name is new", examples.PUBLISHED | {"created": True}, PublishedAdapter)
    return entry(
        "adapters",
        request=request,
        parameters=(_IF_MATCH, _IF_NONE_MATCH),
        description="The same bytes, or replaced; with `dry_run` what would happen",
        answer=examples.PUBLISHED,
        model=UploadAnswer,
        errors={
            201: created,
            **refusals(
                *GATE,
                *JSON_BODY,
                *FILE,
                *CHANGE,
                *ROLLOUT,
                "adapter_not_found",
                "adapter_damaged",
            ),
        },
    )


def _lines(lines: Sequence[Mapping[str, Any]], description: str) -> dict[str, Any]:
    """A body of lines of JSON, which no schema of JSON can describe. Its example is text, too."""
    example = "\n".join(orjson.dumps(line).decode() for line in lines)
    text = f"{description} For example:\n\n```\n{example}\n```"
    schema = {"type": "string", "format": "binary", "description": text}
    return {"application/x-ndjson": {"schema": schema}}


PREDICT = entry(
    "predict",
    request=json_body(examples.PREDICT_REQUESTS, model=PredictRequest),
    parameters=(REQUEST_KEY,),
    answer=examples.PREDICT_RESPONSE,
    model=PredictResponse,
    errors=refusals(*GATE, *JSON_BODY, *SERVED, *INFERENCE),
)
STREAM = entry(
    "predict",
    request=_lines(examples.STREAM_LINES, "Each a string, or an object as `StreamLine`."),
    parameters=[
        REQUEST_KEY,
        *(
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in StreamQuery.model_json_schema()["properties"].items()
        ),
    ],
    errors={
        **refusals(*GATE, "unsupported_media_type", "invalid_request"),
        200: {
            "description": "A line for each line, in order: a `Result`, or a `StreamError`.",
            "content": _lines(
                [
                    *examples.STREAM_ANSWERS,
                    examples.stream_error(UnknownAdapter("sms-spm", ["sms-spam"]), 3, "third"),
                ],
                "Each an object.",
            ),
        },
    },
)
PUT = _upload(_FILE)
POST = _upload(_FORM)
LIST = entry(
    "adapters",
    answer=examples.LIST_PAGE,
    model=AdapterList,
    errors=refusals(*GATE, "invalid_request"),
)
SHOW = entry(
    "adapters",
    answer=examples.DETAIL,
    model=AdapterDetail,
    errors=refusals(*GATE, "adapter_not_found"),
)
_CARD = {"text/markdown": {"schema": {"type": "string"}}}
SHOW_CARD = entry(
    "adapters",
    errors={
        **refusals(
            *GATE,
            *NAMED,
            "card_not_found",
            "adapter_damaged",
            "store_failed",
            "store_unreachable",
            "store_denied",
            "invalid_request",
        ),
        200: {"description": "Markdown", "content": _CARD},
    },
)
PUT_CARD = entry(
    "adapters",
    request=_CARD,
    parameters=(_IF_MATCH,),
    status=204,
    description="Stored",
    errors=refusals(*GATE, *BODY, *NAMED, *CHANGE, "adapter_damaged", "invalid_request"),
)
DIFFERENCE = entry(
    "adapters",
    answer=examples.DIFFERENCE,
    model=RevisionDifference,
    errors=refusals(*GATE, *NAMED, "adapter_damaged", "invalid_request"),
)
DOWNLOAD = entry(
    "adapters",
    errors={
        **refusals(
            *GATE,
            *NAMED,
            "adapter_damaged",
            "store_failed",
            "invalid_request",
            "range_not_satisfiable",
        ),
        200: {"description": "The file", "content": _FILE},
        206: {"description": "The part that `Range` names, or several as `multipart/byteranges`"},
        304: response("`If-None-Match` names this revision"),
    },
)
ROLLBACK = entry(
    "adapters",
    request=json_body(examples.ROLLBACKS, model=RollbackRequest),
    parameters=(_IF_MATCH,),
    answer=examples.PUBLISHED,
    model=PublishedAdapter,
    errors=refusals(*GATE, *JSON_BODY, *SERVED, *CHANGE, *ROLLOUT),
)
DELETE_REVISION = entry(
    "adapters",
    parameters=(_IF_MATCH,),
    status=204,
    description="Gone",
    errors=refusals(
        *GATE, *CHANGE, *NAMED, "revision_current", "revision_tried", "invalid_request"
    ),
)
DELETE = entry(
    "adapters",
    parameters=(_IF_MATCH,),
    status=204,
    description="Gone",
    errors=refusals(*GATE, *CHANGE, "adapter_not_found", "invalid_request"),
)
PUT_TRAFFIC = entry(
    "adapters",
    request=json_body(examples.TRAFFIC_REQUESTS, model=TrafficRequest),
    parameters=(_IF_MATCH,),
    answer=examples.TRAFFIC,
    model=TrafficDetail,
    errors=refusals(
        *GATE,
        *JSON_BODY,
        *SERVED,
        *CHANGE,
        "traffic_not_found",
        *ROLLOUT,
        "revision_current",
        "revision_unlike",
    ),
)
SHOW_TRAFFIC = entry(
    "adapters",
    answer=examples.TRAFFIC,
    model=TrafficDetail,
    errors=refusals(*GATE, "adapter_not_found", "traffic_not_found"),
)
DELETE_TRAFFIC = entry(
    "adapters",
    parameters=(_IF_MATCH,),
    status=204,
    description="The current revision reads all texts",
    errors=refusals(
        *GATE,
        *CHANGE,
        "adapter_not_found",
        "adapter_damaged",
        "traffic_not_found",
        "invalid_request",
    ),
)
PROMOTE = entry(
    "adapters",
    parameters=(_IF_MATCH,),
    answer=examples.PUBLISHED,
    model=PublishedAdapter,
    errors=refusals(*GATE, *SERVED, *CHANGE, *ROLLOUT, "traffic_not_found", "invalid_request"),
)
_KEPT_TEXTS = (
    "adapter_not_found",
    "texts_not_kept",
    "invalid_request",
    "store_failed",
    "audit_failed",
)
DRIFT = entry(
    "adapters",
    answer=examples.DRIFT,
    model=DriftDetail,
    errors=refusals(*GATE, *NAMED, "adapter_damaged", "invalid_request"),
)
UNCERTAIN = entry(
    "adapters",
    description="The least certain first. `format=jsonl` gives a line each, `format=csv` a table.",
    answer=examples.UNCERTAIN,
    model=UncertainTexts,
    errors=refusals(*GATE, *_KEPT_TEXTS),
)
UNCERTAIN["responses"][200]["content"] |= {
    "application/x-ndjson": {"schema": {"type": "string", "format": "binary"}},
    "text/csv": {"schema": {"type": "string"}},
}
FORGET_UNCERTAIN = entry(
    "adapters",
    status=204,
    description="Forgotten",
    errors=refusals(*GATE, *_KEPT_TEXTS),
)
PROBE = entry(
    "operations",
    answer=examples.HEALTHY,
    model=Health,
    errors={503: response("Not so, and why", examples.NOT_READY, Health)},
)
CONSOLE = entry(
    "operations",
    errors={
        200: {"description": "A web page: the console", "content": {"text/html": {}}},
        304: {"description": "The page that `If-None-Match` names is the current one"},
    },
)
METRICS = entry(
    "operations",
    errors={
        **refusals(*KEY, "quota_exceeded", INTERNAL.type),
        200: {"description": "Prometheus' text format", "content": {"text/plain": {}}},
    },
)
