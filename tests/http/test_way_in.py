"""Requests of odd but legal clients: HEAD, weak tags, forms by PUT, encoded bodies, HTTP/2 offers.

Each is answered, or refused with one line that says what to do.
"""

import hashlib
from collections.abc import Iterator

import pytest

from adapters.format.files import serialize
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone

FILE = serialize(make_adapter(make_backbone(), seed=1))
ETAG = f'"{hashlib.sha256(FILE).hexdigest()}"'


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), DEFAULT_ADAPTER="a") as running:
        running.put("a", make_adapter(make_backbone(), seed=1))
        yield running


GET_PATHS = (
    "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json",
    "/v1/adapters", "/v1/adapters/a", "/v1/adapters/a/file", "/v1/adapters/missing",
    "/health", "/ping", "/info", "/adapters/a/info", "/adapters/a/health",
    "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/a",
    "/v2/models/a/ready", "/nowhere",
)  # fmt: skip


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_is_get_without_the_body(live: RunningService, path: str) -> None:
    got, head = live.client.get(path), live.client.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    for name in ("content-type", "etag", "content-disposition"):
        assert head.headers.get(name) == got.headers.get(name)
    if path != "/metrics":  # grows from one scrape to the next
        assert head.headers["content-length"] == str(len(got.content))
    # The connection is still in step.
    assert live.client.get("/healthz").json()["status"] == "ok"


def test_head_is_refused_where_get_is(live: RunningService) -> None:
    assert live.client.head("/v1/predict").status_code == 405


@pytest.mark.parametrize(
    "tags", [ETAG, f"W/{ETAG}", "*", f'W/"other", W/{ETAG}', f'"other",{ETAG}', ETAG.strip('"')]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_file_that_the_client_has_is_304(live: RunningService, method: str, tags: str) -> None:
    headers = {"If-None-Match": tags}
    response = live.client.request(method, "/v1/adapters/a/file", headers=headers)
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == ETAG


@pytest.mark.parametrize("tags", ['"other"', 'W/"other"', ""])
def test_a_file_that_the_client_lacks_is_sent(live: RunningService, tags: str) -> None:
    response = live.client.get("/v1/adapters/a/file", headers={"If-None-Match": tags})
    assert (response.status_code, response.content) == (200, FILE)


def test_weak_tags_match_for_if_none_match_only(live: RunningService) -> None:
    def put(name: str) -> int:
        headers = {name: f"W/{ETAG}"}
        return live.client.put("/v1/adapters/a", content=FILE, headers=headers).status_code

    assert put("If-Match") == 412
    assert put("If-None-Match") == 412
