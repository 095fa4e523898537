"""Requests of odd but legal clients: HEAD, weak tags, forms by PUT, encoded bodies, HTTP/2 offers.

Each is answered, or refused with one line that says what to do.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from adapters.format.files import serialize
from tests.support.http_service import RunningService, error_of, serve
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


def test_a_form_by_put_says_what_to_do(live: RunningService) -> None:
    response = live.client.put("/v1/adapters/new", files={"file": FILE})
    assert response.status_code == 415
    error = error_of(response)
    assert error["type"] == "unsupported_media_type"
    assert error["message"].startswith("this is a form: use POST /v1/adapters, or send the file")
    assert live.client.get("/v1/adapters/new").status_code == 404


ENCODED = (
    ("POST", "/v1/predict", {"adapter": "a", "inputs": "x"}),
    ("POST", "/v1/adapters/a/rollback", {}),
    ("POST", "/predict", {"inputs": "x"}),
    ("POST", "/adapters/a/predict", {"inputs": "x"}),
    ("POST", "/classify", {"input": "x", "model": "a"}),
    ("PUT", "/v1/adapters/a", FILE),
    ("POST", "/v1/adapters", FILE),
)


def _message(path: str, content: dict[str, Any]) -> str:
    """The message of an error in the shape of the path's protocol."""
    if path in ("/predict", "/adapters/a/predict"):
        assert content["error_type"] == "Validation"
        return str(content["error"])
    if path == "/classify":
        assert (content["error"]["type"], content["error"]["code"]) == ("BadRequestError", 415)
    else:
        assert content["error"]["type"] == "unsupported_media_type"
    return str(content["error"]["message"])


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x" * 200])
@pytest.mark.parametrize(("method", "path", "body"), ENCODED)
def test_encoded_bodies_are_415_in_the_shape_of_the_protocol(
    live: RunningService, method: str, path: str, body: Any, encoding: str
) -> None:
    kind = "application/json" if isinstance(body, dict) else "application/octet-stream"
    if path == "/v1/adapters":
        kind = "multipart/form-data; boundary=b"
    plain = json.dumps(body).encode() if isinstance(body, dict) else body
    response = live.client.request(
        method,
        path,
        content=gzip.compress(plain),
        headers={"Content-Type": kind, "Content-Encoding": encoding},
    )
    assert response.status_code == 415, response.text
    assert response.headers["accept-encoding"] == "identity"
    message = _message(path, response.json())
    assert message == f"Content-Encoding is {encoding[:64]}: send the body as it is, not encoded"


def test_identity_is_no_encoding_and_every_header_line_counts(live: RunningService) -> None:
    def status(*encodings: str) -> int:
        headers = [("Content-Type", "application/json")]
        headers += [("Content-Encoding", encoding) for encoding in encodings]
        body = b'{"adapter": "a", "inputs": "x"}'
        return live.client.post("/v1/predict", content=body, headers=headers).status_code

    assert status("identity") == 200
    assert status("Identity", "") == 200
    assert status("identity", "gzip") == 415


def test_the_open_inference_protocol_still_decodes(live: RunningService) -> None:
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["x"]}]}
    response = live.client.post(
        "/v2/models/a/infer",
        content=gzip.compress(json.dumps(body).encode()),
        headers={"Content-Encoding": "gzip"},
    )
    assert response.status_code == 200, response.text
