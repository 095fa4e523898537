"""Requests of odd but legal clients: HEAD, weak tags, forms by PUT, encoded bodies, HTTP/2 offers.

Each is answered, or refused with one line that says what to do.
"""

import gzip
import hashlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.format.files import serialize
from tests.support.http_service import RunningService, error_of, serve
from tests.support.service_process import environ, service_process
from tests.support.tiny_models import make_adapter, make_backbone, save_backbone

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


@pytest.mark.slow
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


ENCODED: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/predict", {"adapter": "a", "inputs": "x"}),
    ("POST", "/v1/adapters/a/rollback", {}),
    ("POST", "/predict", {"inputs": "x"}),
    ("POST", "/adapters/a/predict", {"inputs": "x"}),
    ("POST", "/classify", {"input": "x", "model": "a"}),
    ("POST", "/v1/rerank", {"query": "x", "documents": ["y"], "model": "a"}),
    ("POST", "/rerank", {"query": "x", "texts": ["y"]}),
    ("POST", "/embed", {"inputs": "x"}),
    ("POST", "/v1/embeddings", {"input": "x"}),
    ("PUT", "/v1/adapters/a", FILE),
    ("POST", "/v1/adapters", FILE),
)


def _message(path: str, content: dict[str, Any]) -> str:
    """The message of an error in the shape of the path's protocol."""
    if path in ("/predict", "/adapters/a/predict", "/rerank", "/embed"):
        assert content["error_type"] == "Validation"
        return str(content["error"])
    if path in ("/classify", "/v1/rerank", "/v1/embeddings"):
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


BODY = b'{"adapter": "a", "inputs": "hello you"}'
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


def _request(offer: str, *, chunked: bool = False, target: str = "/v1/predict") -> bytes:
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(BODY)}"
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY) if chunked else BODY
    head = f"POST {target} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    return f"{head}{framing}\r\n{offer}\r\n".encode() + body


def _exchange(live: RunningService, *pieces: bytes, answers: int = 1) -> list[tuple[int, bytes]]:
    """Send raw pieces, each in a packet of its own; the status and body of every answer."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            if len(pieces) < 100:
                time.sleep(0.02)
        received = []
        with connection.makefile("rb") as stream:
            for _ in range(answers):
                status = int(stream.readline().split()[1])
                length = int(http.client.parse_headers(stream)["content-length"])
                received.append((status, stream.read(length)))
    return received


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "offer",
    [
        H2C,
        H2C.lower(),
        H2C.replace("Connection: ", "Connection: keep-alive, "),
        "Connection: Upgrade\r\nUpgrade: websocket\r\n",
        "Upgrade: h2c\r\nConnection: Upgrade, close\r\n",
    ],
)
def test_an_offer_of_another_protocol_is_ignored(
    live: RunningService, offer: str, chunked: bool
) -> None:
    ((status, body),) = _exchange(live, _request(offer, chunked=chunked))
    assert status == 200, body
    assert json.loads(body)["results"][0]["adapter"] == "a"


def test_an_offer_may_come_in_pieces_of_any_size(live: RunningService) -> None:
    whole = _request(H2C)
    head = whole.index(b"\r\n\r\n") + 4
    for cut in (10, head - 2, head, head + 5):
        ((status, _),) = _exchange(live, whole[:cut], whole[cut:])
        assert status == 200, cut
    ((status, _),) = _exchange(live, *(whole[at : at + 1] for at in range(len(whole))))
    assert status == 200


def test_a_connection_goes_on_after_an_offer(live: RunningService) -> None:
    many = b"".join(_request(H2C if index % 2 else "") for index in range(6))
    assert [status for status, _ in _exchange(live, many, answers=6)] == [200] * 6


@pytest.mark.slow
def test_thousands_of_offers_in_one_packet_are_answered_in_order(live: RunningService) -> None:
    get = f"GET /v2 HTTP/1.1\r\nHost: h\r\n{H2C}\r\n".encode()
    answers = _exchange(live, get * 2000, answers=2000)
    assert {status for status, _ in answers} == {200}


def test_a_broken_request_after_an_offer_is_400(live: RunningService) -> None:
    statuses = [status for status, _ in _exchange(live, b"nonsense\r\n\r\n")]
    assert statuses == [400]
    bad = _request(H2C.replace("HTTP2-Settings: ", "HTTP2-Settings : "))
    assert [status for status, _ in _exchange(live, bad)] == [400]


def test_connect_is_refused(live: RunningService) -> None:
    ((status, _),) = _exchange(live, b"CONNECT other:80 HTTP/1.1\r\nHost: other:80\r\n\r\n")
    assert 400 <= status < 500


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("OPTIONS", "/v1/adapters", "GET, HEAD, POST"),
        ("PATCH", "/v1/adapters/a", "DELETE, GET, HEAD, PUT"),
        ("GET", "/v1/predict", "POST"),
        ("DELETE", "/metrics", "GET, HEAD"),
        ("PUT", "/v2/models/a/infer", "POST"),
        ("POST", "/docs", "GET, HEAD"),
    ],
)
def test_another_method_is_405_with_all_methods_of_the_path(
    live: RunningService, method: str, path: str, allowed: str
) -> None:
    answer = live.client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/predict", {"adapter": "a", "inputs": "x", "top_k": 1.0, "timeout_ms": 20000.0}),
        ("/predict", {"inputs": "x", "parameters": {"top_k": 2.0}}),
        ("/classify", {"input": "x", "truncate_prompt_tokens": -1.0}),
        (
            "/v2/models/a/infer",
            {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1.0], "data": ["x"]}]},
        ),
    ],
)
def test_a_whole_number_may_be_written_with_a_point(
    live: RunningService, path: str, body: dict[str, Any]
) -> None:
    """To JSON 2.0 and 2 are the same number."""
    assert live.client.post(path, json=body).status_code == 200


@pytest.mark.parametrize("number", [1.5, 1e30, "1", True, 2**31, 2**70])
def test_other_numbers_are_refused(live: RunningService, number: Any) -> None:
    body = {"adapter": "a", "inputs": "x", "top_k": number}
    answer = live.client.post("/v1/predict", json=body)
    assert answer.status_code == 422
    assert error_of(answer)["details"][0].startswith("top_k: ")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_flood_of_bad_requests_fills_no_log_and_forges_no_line(
    tmp_path: Path, workers: str
) -> None:
    """None of them has a key; at this level each request would have a line of its own."""
    folder = save_backbone(tmp_path / "backbone")
    environment = environ(folder, tmp_path / "adapters", WORKERS=workers, API_KEYS="k")
    log = tmp_path / "log"
    with log.open("w") as file, service_process(environment, stderr=file) as running:
        assert running.stdout is not None
        url = running.stdout.readline().split()[1]
        port = int(url.rpartition(":")[2])
        before = len(log.read_text().splitlines())
        forged = "/v1/adapters/x%0A2026-01-01T00:00:00+00:00%20error%20forged%1B%5B2J"
        for raw in (b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n"):
            for _ in range(60):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                    connection.sendall(raw)
                    connection.recv(1000)
        with httpx.Client(base_url=url) as client:
            for index in range(200):
                header = {"Authorization": f"Bearer wrong-{index}"}
                assert client.get(forged, headers=header).status_code in (401, 429)
            assert client.get("/healthz").status_code == 200
        lines = log.read_text().splitlines()[before:]
        # A few seconds with ten lines each from few places, in each process.
        assert len(lines) < 150, "\n".join(lines[:20])
        assert not [line for line in lines if line.startswith("2026-01-01")]
        assert all(line.isprintable() for line in lines)
