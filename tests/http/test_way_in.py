"""Requests of odd but legal clients: HEAD, weak tags, forms by PUT, encoded bodies, HTTP/2 offers.

Each is answered, or refused with one line that says what to do.
"""

from collections.abc import Iterator

import pytest

from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone


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
