"""Keys: everything is closed unless it is named open, whatever routes there will be."""

from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from service.errors import Unauthorized
from service.http.middleware import Keyring
from service.http.open_paths import OPEN_PATHS
from service.settings import read_settings
from tests.support.http_service import RunningService, error_of, serve
from tests.support.tiny_models import make_adapter, make_backbone

OPEN = {"/healthz", "/readyz", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json"} | {
    "/health",
    "/ping",
    "/v2/health/live",
    "/v2/health/ready",
}
USER, ADMIN = "user-key", "admin-key"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("adapters")
    with serve(folder, API_KEYS=f"{USER}, second", ADMIN_KEYS=ADMIN) as running:
        running.put("a", make_adapter(make_backbone()), Authorization=f"Bearer {ADMIN}")
        yield running


def routes(live: RunningService) -> list[tuple[str, str]]:
    """Method and path of every route of the app, also of those that OpenAPI does not show."""
    routes_of_app = []
    for context in iter_route_contexts(live.app.routes):
        assert context.path is not None
        path = context.path.replace("{name}", "a")
        routes_of_app += [(method, path) for method in sorted(context.methods or ())]
    return routes_of_app


def ask(live: RunningService, method: str, path: str, **headers: str) -> httpx.Response:
    return live.client.request(method, path, headers=headers)


def test_every_route_but_the_open_ones_asks_for_a_key(live: RunningService) -> None:
    asked = routes(live)
    assert {path for _, path in asked} > OPEN
    assert OPEN_PATHS == OPEN
    for method, path in asked:
        status = ask(live, method, path).status_code
        assert (status == 401) == (path not in OPEN), (method, path, status)


def test_paths_without_a_route_are_closed_too(live: RunningService) -> None:
    for path in (
        "/",
        "/v1",
        "/v1/nothing",
        "//healthz",
        "/healthz/",
        "/HEALTHZ",
        "/healthz/../v1/adapters",
    ):
        assert ask(live, "GET", path).status_code == 401, path


def test_unknown_keys_are_401_and_say_how_to_send_one(live: RunningService) -> None:
    for headers in (
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {USER}"},
        {"Authorization": USER},
        {"Authorization": "Bearer"},
        {"X-API-Key": ""},
        {"X-API-Key": f"{USER}x"},
        {"X-API-Key": USER[:-1]},
    ):
        response = ask(live, "GET", "/v1/adapters", **headers)
        assert response.status_code == 401, headers
        assert error_of(response)["type"] == "unauthorized"
        assert response.headers["www-authenticate"] == "Bearer"


def test_either_header_carries_a_key(live: RunningService) -> None:
    for key in (USER, "second", ADMIN):
        for headers in ({"Authorization": f"bearer {key}"}, {"X-API-Key": key}):
            assert ask(live, "GET", "/v1/adapters", **headers).status_code == 200


def test_changing_adapters_is_403_with_a_plain_key(live: RunningService) -> None:
    for method, path in routes(live):
        if path.startswith("/v1/adapters") and method not in ("GET", "HEAD"):
            response = ask(live, method, path, **{"X-API-Key": USER})
            assert response.status_code == 403, (method, path)
            assert error_of(response)["type"] == "forbidden"
            assert ask(live, method, path, **{"X-API-Key": "wrong"}).status_code == 401
    assert live.service.catalog.entry("a").state == "ready"
    body = {"adapter": "a", "inputs": "x"}
    assert (
        live.client.post("/v1/predict", json=body, headers={"X-API-Key": USER}).status_code == 200
    )


def test_admin_keys_alone_leave_reading_open() -> None:
    keyring = Keyring(read_settings({"IDSPAM_ADMIN_KEYS": ADMIN}))
    keyring.check(method="POST", path="/v1/predict", headers={})
    keyring.check(method="GET", path="/v1/adapters", headers={})
    keyring.check(method="DELETE", path="/v1/adapters/a", headers={"x-api-key": ADMIN})
    for method, path in (
        ("PUT", "/v1/adapters/a"),
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/adapters/a"),
    ):
        with pytest.raises(Unauthorized):
            keyring.check(method=method, path=path, headers={})


def test_plain_keys_alone_may_change_adapters() -> None:
    keyring = Keyring(read_settings({"IDSPAM_API_KEYS": USER}))
    keyring.check(method="PUT", path="/v1/adapters/a", headers={"x-api-key": USER})
    with pytest.raises(Unauthorized):
        keyring.check(method="PUT", path="/v1/adapters/a", headers={})


def test_a_request_is_attributed_to_its_key() -> None:
    keyring = Keyring(read_settings({"IDSPAM_API_KEYS": "x,y", "IDSPAM_ADMIN_KEYS": ADMIN}))

    def holder(path: str, **headers: str) -> tuple[str, float]:
        return keyring.check(method="GET", path=path, headers=headers)

    assert holder("/v1/adapters", authorization="Bearer y") == ("api-2", 1.0)
    assert holder("/v1/adapters", authorization=f"Bearer {ADMIN}") == ("admin-1", 1.0)
    assert holder("/healthz", authorization="Bearer y") == ("", 1.0)


def test_without_keys_everything_is_open() -> None:
    Keyring(read_settings({})).check(method="DELETE", path="/v1/adapters/a", headers={})
