"""The clients against the OpenAPI document: every route has a method, or a reason to have none."""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import msgspec
import pytest

from service.client import Client, ClientError, types
from service.client.types import Options
from tests.support.http_service import serve

OTHERS = "a route of another server's protocol, for the clients of that server"
# Routes that the client leaves out.
LEFT_OUT: Mapping[tuple[str, str], str] = {
    ("GET", "/"): "a page for people",
    ("POST", "/v1/adapters"): "a form, for browsers: `upload` sends the file itself",
    ("POST", "/v2/rerank"): "another name of /v1/rerank, which `rerank` asks",
    **{
        ("POST", path): OTHERS
        for path in (
            "/",
            "/predict",
            "/invocations",
            "/adapters/{name}",
            "/adapters/{name}/predict",
            "/rerank",
            "/adapters/{name}/rerank",
            "/embed",
            "/classify",
            "/v2/models/{name}/infer",
            "/v2/models/{name}/versions/{version}/infer",
            "/v2/repository/index",
        )
    },
    **{
        ("GET", path): OTHERS
        for path in (
            "/info",
            "/adapters/{name}/info",
            "/health",
            "/ping",
            "/adapters/{name}/health",
            "/v2",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models",
            "/v2/models/{name}",
            "/v2/models/{name}/ready",
            "/v2/models/{name}/versions/{version}",
            "/v2/models/{name}/versions/{version}/ready",
        )
    },
}
# What methods call it.
RENAMED = {
    "input": "inputs",
    "model": "adapter",
    "truncate_prompt_tokens": "truncate",
    "dry_run": "check",
    "name[]": "names",
}
TURNS_PAGES = "`adapters` turns the pages"
ONE_FORM = "the client asks for one form and reads it"
# Parameters and fields of a body that no method has.
NOT_TAKEN: Mapping[tuple[str, str], str] = {
    ("/v1/adapters", "limit"): TURNS_PAGES,
    ("/v1/adapters", "cursor"): TURNS_PAGES,
    ("/v1/rerank", "return_documents"): "the caller has the documents",
    ("/v1/rerank", "use_activation"): "the service refuses false",
    ("/v1/embeddings", "encoding_format"): ONE_FORM,
    ("/v1/embeddings", "adapter"): "there is one backbone",
    ("/v2/repository/models/{name}/load", "force"): "only with a file: `upload` sends files",
    ("/v2/repository/models/{name}/load", "wait"): "only with a file: `upload` sends files",
    ("/v2/repository/models/{name}/load", "parameters"): "the file, or what Triton sends",
    ("/v2/repository/models/{name}/unload", "parameters"): "what Triton sends, and is ignored",
}
# Types of the client with another name than the schema of the same.
TYPES = {
    "AdapterList": types.AdapterPage,
    "DriftDetail": types.Drift,
    "ErrorBody": types.ErrorContent,
    "ExplainedWord": types.Word,
    "PredictInput": types.Input,
    "PredictResponse": types.Answer,
    "PublishedAdapter": types.Published,
    "ReadCharacters": types.Read,
    "StreamError": types.Unanswered,
    "TrafficDirection": types.Direction,
    "TrafficEnding": types.Ending,
    "TrafficFigures": types.Figures,
    "TrafficReading": types.Reading,
    "TrafficRule": types.Rule,
    "UploadError": types.UploadRefusal,
}
# Fields that the client does not read.
NOT_READ: Mapping[tuple[str, str], str] = {
    ("StreamError", "line"): "of one connection; a stream may need several, and answers in order",
}
ARGUMENTS: Mapping[str, Any] = {
    "documents": ["a", "b"],
    "file": b"content",
    "format": "csv",
    "inputs": "a text",
    "name": "a",
    "percent": 5.0,
    "query": "a query",
    "revision": "0a1b",
    "text": "# A card",
}
Document = dict[str, Any]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Document]:
    with serve(tmp_path_factory.mktemp("adapters")) as live:
        yield live.client.get("/openapi.json").json()


def methods() -> dict[str, Any]:
    return {
        name: member
        for name, member in vars(Client).items()
        if inspect.isfunction(member) and not name.startswith("_") and name != "close"
    }


def sent_by(name: str) -> tuple[str, str]:
    """The method and the path of the request that a method of the client sends."""
    if name == "stream":
        # It has connections of its own: tests/client/test_stream.py.
        return "POST", "/v1/predict/stream"
    sent: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((request.method, request.url.path))
        return httpx.Response(400, json={"error": {"type": "none", "message": "none"}})

    parameters = inspect.signature(getattr(Client, name)).parameters.values()
    arguments = {
        each.name: ARGUMENTS[each.name]
        for each in parameters
        if each.default is each.empty and each.name not in ("self", "options")
    }
    if name == "classify":
        arguments["inputs"] = ["a text"]
    with (
        Client("http://127.0.0.1:1", transport=httpx.MockTransport(answer)) as client,
        pytest.raises(ClientError),
    ):
        # `classify` sends nothing before it is read.
        list(getattr(client, name)(**arguments))
    assert len(set(sent)) == 1, f"{name} sent {sent}"
    return sent[0]


def template(document: Document, method: str, path: str) -> tuple[str, str]:
    """The route of a request: the template with the fewest variables that fits."""
    fitting = [
        known
        for known, operations in document["paths"].items()
        if method.lower() in operations
        and re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(known)), path)
    ]
    assert fitting, f"{method} {path} is no route"
    return method, min(fitting, key=lambda known: known.count("{"))


@pytest.fixture(scope="module")
def by_route(document: Document) -> dict[tuple[str, str], list[str]]:
    """The methods of the client that ask each route."""
    found = defaultdict(list)
    for name in methods():
        found[template(document, *sent_by(name))].append(name)
    return found


def test_every_route_has_a_method_or_a_reason_to_have_none(
    document: Document, by_route: dict[tuple[str, str], list[str]]
) -> None:
    routes = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert routes - by_route.keys() - LEFT_OUT.keys() == set()
    # A reason is given for no route that is gone or has a method.
    assert LEFT_OUT.keys() - routes == set()
    assert LEFT_OUT.keys() & by_route.keys() == set()


def test_methods_take_what_their_routes_take(
    document: Document, by_route: dict[tuple[str, str], list[str]]
) -> None:
    missing, used = [], set()
    for (method, path), names in by_route.items():
        taken = {"check"} & set(names)
        for name in names:
            taken |= set(inspect.signature(getattr(Client, name)).parameters)
        if "options" in taken:
            taken |= set(Options.__annotations__)
        for asked in parameters_of(document, document["paths"][path][method.lower()]):
            wanted = RENAMED.get(asked, asked)
            if wanted not in taken:
                if (path, wanted) in NOT_TAKEN:
                    used.add((path, wanted))
                else:
                    missing.append(f"{method} {path}: {asked}")
    assert not missing
    assert NOT_TAKEN.keys() == used


def parameters_of(document: Document, operation: Document) -> list[str]:
    """Names of the query and of the fields of a JSON body."""
    names = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = body.get("schema", {})
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].split("/")[-1]]
    return names + list(schema.get("properties", ()))


def test_the_types_of_the_client_have_the_fields_of_the_schemas(document: Document) -> None:
    structs: dict[str, Any] = {
        name: kind
        for name, kind in vars(types).items()
        if inspect.isclass(kind) and issubclass(kind, msgspec.Struct)
    }
    compared = 0
    for name, schema in document["components"]["schemas"].items():
        kind: Any = TYPES.get(name) or structs.get(name)
        if kind is None or "properties" not in schema:
            continue
        compared += 1
        fields = {each.encode_name for each in msgspec.structs.fields(kind)}
        ignored = {field for schema_name, field in NOT_READ if schema_name == name}
        assert fields | ignored == set(schema["properties"]), name
        assert not fields & ignored, name
    assert compared > 30
    assert TYPES.keys() <= document["components"]["schemas"].keys()
