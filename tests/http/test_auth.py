"""Keys: everything is closed unless it is named open, whatever routes there will be."""

from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from service.access.scopes import SCOPES, Need, match, needs
from service.http.app import require_scopes
from tests.support.http_service import RunningService, error_of, serve
from tests.support.key_files import bearer, write_keys
from tests.support.tiny_models import make_adapter, make_backbone

OPEN = {"/healthz", "/readyz", "/docs", "/openapi.json"} | {
    "/health",
    "/ping",
    "/v2/health/live",
    "/v2/health/ready",
    "/docs/start.js",
    "/docs/swagger-ui-bundle.js",
    "/docs/swagger-ui.css",
    "/docs/favicon.png",
    "/",
    "/console",
    "/console/file",
    "/console/folder/file",
}
USER, ADMIN = "user-key", "admin-key"


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, str]
) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("adapters")
    file = folder / "keys.jsonl"
    one_scope = {scope.replace(":", "_"): {"scopes": [scope]} for scope in SCOPES}
    team = {"adapters": ["team-*", "b"], "scopes": ["predict", "adapters:read", "adapters:write"]}
    tokens |= write_keys(file, everything={}, team=team, **one_scope)
    with serve(
        folder / "adapters", API_KEYS=f"{USER}, second", ADMIN_KEYS=ADMIN, KEYS_FILE=str(file)
    ) as running:
        for name in ("a", "b", "team-x"):
            running.put(name, make_adapter(make_backbone()), Authorization=f"Bearer {ADMIN}")
        yield running


def routes(live: RunningService) -> list[tuple[str, str, Need]]:
    """Method, path and need of every route of the app, also of those that OpenAPI does not show."""
    routes_of_app = []
    for context in iter_route_contexts(live.app.routes):
        assert context.path is not None
        path = context.path.replace("{name}", "a").replace("{version}", "0").replace("{", "")
        for method in sorted(context.methods or ()):
            need = needs()["GET" if method == "HEAD" else method, context.path]
            routes_of_app.append((method, path.replace("}", ""), need))
    return routes_of_app


def ask(live: RunningService, method: str, path: str, **headers: str) -> httpx.Response:
    return live.client.request(method, path, headers=headers)


@pytest.mark.slow
def test_every_route_but_the_open_ones_asks_for_a_key(live: RunningService) -> None:
    asked = routes(live)
    assert {path for _, path, _ in asked} > OPEN
    for method, path, need in asked:
        status = ask(live, method, path).status_code
        # `/` is the console, and to POST a route that predicts.
        is_open = path in OPEN and (method, path) != ("POST", "/")
        assert (status == 401) == (not is_open) == (not need.is_open), (method, path, status)
        assert ask(live, method, path, **bearer("wrong")).status_code in (
            (status,) if need.is_open else (401, 429)
        )


def test_every_scope_opens_its_own_routes_and_no_other(
    live: RunningService, tokens: dict[str, str]
) -> None:
    """The table is written down here a second time: by what a route does."""
    for method, path, need in routes(live):
        if need.is_open:
            continue
        enough = expected_scopes(method, path)
        for scope in SCOPES:
            answer = ask(live, method, path, **bearer(tokens[scope.replace(":", "-")]))
            refused = answer.status_code == 403
            assert refused == (scope not in enough), (method, path, scope, answer.text)
            assert answer.status_code != 401
            if scope in enough and scope == "adapters:write":
                # DELETE and unload have worked.
                live.put("a", make_adapter(make_backbone()), **bearer(tokens["everything"]))


def expected_scopes(method: str, path: str) -> set[str]:
    if path == "/metrics":
        return {"metrics"}
    if path == "/v2":
        return set(SCOPES)
    if path.endswith("/uncertain"):
        return {"texts"}
    if path.startswith("/v1/adapters"):
        return {"adapters:read"} if method in ("GET", "HEAD") else {"adapters:write"}
    if path.startswith("/v2/repository/models"):
        return {"adapters:write"}
    if path in ("/v2/repository/index", "/v2/models"):
        return {"adapters:read"}
    if method == "POST":
        return {"predict"}
    return {"predict", "adapters:read"}


VARIANTS = (
    "{0}/",
    "/{0}",
    "{0}//",
    "{0}?key=1",
    "/.{0}",
    "/%2e{0}",
    "/x/..{0}",
    "{0}%2f",
    "{0}%00",
    "{0};a=b",
)


def test_a_variant_of_a_path_is_another_path_and_closed(
    live: RunningService, tokens: dict[str, str]
) -> None:
    """Variants reach no route: a key that may do nothing but read metrics gets 404 or 403."""
    address = httpx.URL(live.url)
    # httpx would send another path than this.
    with closing(HTTPConnection(address.host, address.port or 0, timeout=20)) as connection:

        def status(method: str, path: str, **headers: str) -> int:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status

        for method, path, need in routes(live):
            for variant in [*VARIANTS, path.upper()]:
                other = variant.format(path)
                same = other == path or "?" in other
                if same and need.is_open:
                    continue
                # A variant of an open file is another file of that folder, which is not there.
                closed = {401, 404} if path.startswith("/console/") else {401}
                assert status(method, other) in closed, (method, other)
                answered = status(method, other, **bearer(tokens["metrics"]))
                may = same and "metrics" in (need.scopes or SCOPES)
                assert may or answered in (403, 404, 405), (method, other, answered)


def test_other_methods_of_a_path_need_a_key_and_are_405_with_one(
    live: RunningService, tokens: dict[str, str]
) -> None:
    known = {(method, path) for method, path, _ in routes(live)}
    for path in sorted({path for _, path in known}):
        for method in ("OPTIONS", "PATCH", "TRACE", "PROPFIND"):
            assert ask(live, method, path).status_code == 401, (method, path)
            answer = ask(live, method, path, **bearer(tokens["metrics"]))
            assert answer.status_code == 405, (method, path)
            allowed = set(answer.headers["allow"].split(", "))
            methods = {known_method for known_method, at in known if at == path} - {"HEAD"}
            assert allowed == methods | ({"HEAD"} if "GET" in methods else set())


def test_paths_without_a_route_are_closed_too(live: RunningService, tokens: dict[str, str]) -> None:
    for path in (
        "/v1",
        "/v1/nothing",
        "/healthz/",
        "/HEALTHZ",
        "/healthz/../v1/adapters",
    ):
        assert ask(live, "GET", path).status_code == 401, path
        assert ask(live, "GET", path, **bearer(tokens["everything"])).status_code in (404, 405, 200)


def test_unknown_keys_are_401_and_say_how_to_send_one(live: RunningService) -> None:
    for headers in (
        {"Authorization": f"Basic {USER}"},
        {"Authorization": USER},
        {"Authorization": "Bearer"},
        {"X-API-Key": ""},
        {"X-API-Key": f"{USER}x"},
        {"X-API-Key": USER[:-1]},
    ):
        response = ask(live, "GET", "/v1/adapters", **headers)
        assert response.status_code in (401, 429), headers
        if response.status_code == 401:
            assert error_of(response)["type"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"


def test_either_header_carries_a_key(live: RunningService, tokens: dict[str, str]) -> None:
    for key in (tokens["everything"], tokens["adapters-read"]):
        for headers in ({"Authorization": f"bearer {key}"}, {"X-API-Key": key}):
            assert ask(live, "GET", "/v1/adapters", **headers).status_code == 200


def test_a_key_for_some_adapters_reaches_and_sees_no_other(
    live: RunningService, tokens: dict[str, str]
) -> None:
    team = bearer(tokens["team"])
    everything = bearer(tokens["everything"])
    listed = ask(live, "GET", "/v1/adapters", **team).json()["adapters"]
    assert [item["name"] for item in listed] == ["b", "team-x"]
    assert ask(live, "GET", "/v2/models", **team).json() == {"models": ["b", "team-x"]}
    index = ask(live, "POST", "/v2/repository/index", **team).json()
    assert [item["name"] for item in index] == ["b", "team-x"]
    for method, path, need in routes(live):
        if not need.is_open and "/a" in path.replace("/adapters", ""):
            for name in ("a", "nothing"):
                asked = path.replace("/a", f"/{name}") if path.count("/a") == 1 else None
                asked = asked or path.replace("/adapters/a", f"/adapters/{name}")
                answer = ask(live, method, asked, **team)
                assert answer.status_code == 403, (method, asked)
    file = live.client.get("/v1/adapters/a/file", headers=everything).content
    form = {"data": {"name": "other"}, "files": {"file": file}}
    assert live.client.post("/v1/adapters", headers=team, **form).status_code == 403  # type: ignore[arg-type]
    assert live.client.put("/v1/adapters/team-y", headers=team, content=file).status_code == 201


@pytest.mark.parametrize("name", ["a", "nothing"])
def test_a_key_for_some_adapters_cannot_name_another_in_a_body(
    live: RunningService, tokens: dict[str, str], name: str
) -> None:
    team = bearer(tokens["team"])
    bodies = (
        ("/v1/predict", {"adapter": name, "inputs": "x"}),
        ("/v1/predict", {"adapter": "b", "inputs": [{"text": "x", "adapter": name}]}),
        ("/classify", {"model": name, "input": "x"}),
        ("/v1/rerank", {"model": name, "query": "x", "documents": ["y"]}),
    )
    for path, body in bodies:
        answer = live.client.post(path, json=body, headers=team)
        assert answer.status_code == 403, path
        assert name in answer.text
        assert "team-*" in answer.text
    fine = {"adapter": "b", "inputs": "x"}
    assert live.client.post("/v1/predict", json=fine, headers=team).status_code == 200


def test_an_error_names_no_adapter_that_the_key_may_not_see(
    live: RunningService, tokens: dict[str, str]
) -> None:
    body = {"adapter": "team-none", "inputs": "x"}
    shown = live.client.post("/v1/predict", json=body, headers=bearer(tokens["team"])).json()
    assert [name for name in shown["error"]["details"] if not name.startswith("team-")] == ["b"]
    hidden = live.client.post("/v1/predict", json=body, headers=bearer(tokens["predict"])).json()
    assert hidden["error"]["details"] == []
    assert hidden["error"]["message"] == "no adapter is named 'team-none'"


def test_keys_of_the_environment_may_read_or_do_everything(tmp_path: Path) -> None:
    with serve(tmp_path, API_KEYS=f"{USER},second", ADMIN_KEYS=ADMIN) as live:
        live.put("a", make_adapter(make_backbone()), **bearer(ADMIN))
        body = {"adapter": "a", "inputs": "x"}
        for key in (USER, "second", ADMIN):
            assert live.client.post("/v1/predict", json=body, headers=bearer(key)).is_success
            assert ask(live, "GET", "/metrics", **bearer(key)).is_success
            assert ask(live, "GET", "/v1/adapters", **bearer(key)).is_success
        for method, path, need in routes(live):
            if need.changes_adapters:
                response = ask(live, method, path, **bearer(USER))
                assert response.status_code == 403, (method, path)
        assert ask(live, "DELETE", "/v1/adapters/a", **bearer(ADMIN)).status_code == 204


def test_admin_keys_alone_close_everything_too(tmp_path: Path) -> None:
    with serve(tmp_path, ADMIN_KEYS=ADMIN) as live:
        assert ask(live, "GET", "/v1/adapters").status_code == 401
        assert ask(live, "GET", "/v1/adapters", **bearer(ADMIN)).status_code == 200


def test_without_keys_everything_is_open_but_only_known_routes_are_reached(
    tmp_path: Path,
) -> None:
    with serve(tmp_path) as live:
        live.put("a", make_adapter(make_backbone()))
        assert ask(live, "GET", "/metrics").status_code == 200
        assert ask(live, "GET", "/v1/adapters").status_code == 200
        assert ask(live, "GET", "/v1/adapters/").status_code == 404
        assert ask(live, "PATCH", "/v1/adapters").status_code == 405


def test_every_row_of_the_table_is_a_route(live: RunningService) -> None:
    asked = {
        (method, context.path)
        for context in iter_route_contexts(live.app.routes)
        for method in context.methods or ()
    }
    assert set(needs()) <= asked
    assert match("GET", "/v1/adapters/") is None


def test_the_document_says_which_scope_each_operation_needs(live: RunningService) -> None:
    document = live.client.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer"
    assert schemes["key"]["name"] == "X-API-Key"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            need = needs()[method.upper(), path]
            scopes = {
                scope for item in operation["security"] for scope in next(iter(item.values()))
            }
            assert scopes == need.scopes, (method, path)
            assert (operation["security"] == []) == need.is_open
            if not need.is_open:
                assert {"401", "403", "429"} <= set(operation["responses"]), (method, path)


def test_head_needs_what_get_needs(live: RunningService, tokens: dict[str, str]) -> None:
    for method, path, need in routes(live):
        if method == "GET" and not need.is_open:
            assert ask(live, "HEAD", path).status_code == 401, path
            answer = ask(live, "HEAD", path, **bearer(tokens["metrics"]))
            assert (answer.status_code == 403) == ("metrics" not in (need.scopes or SCOPES)), path


def test_a_route_that_the_table_of_scopes_lacks_stops_the_start() -> None:
    app = FastAPI(docs_url=None, openapi_url=None)
    app.add_api_route("/new", lambda: None)
    with pytest.raises(RuntimeError, match=r"scopes\.py for \[\('GET', '/new'\)\]"):
        require_scopes(app)
