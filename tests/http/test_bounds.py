"""Every size, number and time of connections and requests has a bound, and each bound an answer."""

import gc
import http.client
import json
import select
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from service.errors import Overloaded
from service.http.body_budget import BodyBudget
from service.http.bounded_http import (
    LINGER_HEAD_BYTES,
    MAX_FRAMING_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED_BYTES,
    MAX_URL_BYTES,
)
from service.settings import InvalidSettings, read_settings
from tests.support.http_service import RunningService, error_of, serve, until
from tests.support.raw_http import (
    HOST,
    Answer,
    answers,
    connected,
    seconds_until_closed,
    send_until_closed,
    sent_and_answered,
)
from tests.support.tiny_models import make_adapter, make_backbone

MAX_BODY = 2**20
HEAD_SECONDS, STALL_SECONDS, PACE = 1.0, 1.5, 10_000
BODY = b'{"adapter": "a", "inputs": "hello you"}'
POST = b"POST /v1/predict HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
PREDICT = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
LAST_PREDICT = PREDICT.replace(b"Host: h", b"Host: h\r\nConnection: close")
PUT = b"PUT /v1/adapters/b HTTP/1.1\r\nHost: h\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(
        tmp_path_factory.mktemp("adapters"),
        MAX_BODY_BYTES=str(MAX_BODY),
        HEADER_SECONDS=str(HEAD_SECONDS),
        STALL_SECONDS=str(STALL_SECONDS),
        MIN_BYTES_PER_SECOND=str(PACE),
        DEFAULT_ADAPTER="a",
    ) as running:
        running.put("a", make_adapter(make_backbone(), seed=1))
        yield running


def ended(live: RunningService, reason: str) -> float:
    return live.metric("idspam_connections_ended_total", reason=reason)


def only(received: list[Answer]) -> Answer:
    (answer,) = received
    return answer


# Sizes.


def url_of_size(size: int) -> bytes:
    return (
        b"GET /healthz?" + b"a" * (size - len("/healthz?")) + b" HTTP/1.1\r\nConnection: close\r\n"
    )


def head_of_size(size: int) -> bytes:
    start = b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\nX-A: "
    return start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"


@pytest.mark.slow
def test_a_url_is_refused_over_its_size_and_not_below(live: RunningService) -> None:
    longest = sent_and_answered(live.url, url_of_size(MAX_URL_BYTES) + HOST + b"\r\n")
    assert only(longest).status == 200
    before = ended(live, "url")
    refused = only(sent_and_answered(live.url, url_of_size(MAX_URL_BYTES + 1) + HOST + b"\r\n"))
    assert (refused.status, refused.error["type"]) == (414, "uri_too_long")
    assert refused.headers["connection"] == "close"
    until(lambda: ended(live, "url") == before + 1)


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_head_is_refused_over_its_size_and_not_below(live: RunningService, pieces: int) -> None:
    def answer(size: int) -> Answer:
        head = head_of_size(size)
        step = -(-len(head) // pieces)
        cut = [head[at : at + step] for at in range(0, len(head), step)]
        return only(sent_and_answered(live.url, *cut))

    assert answer(MAX_HEAD_BYTES).status == 200
    refused = answer(MAX_HEAD_BYTES + 1)
    assert (refused.status, refused.error["type"]) == (431, "headers_too_large")
    assert refused.headers["connection"] == "close"


def test_headers_are_refused_over_their_number_and_not_below(live: RunningService) -> None:
    def status(number: int) -> int:
        lines = b"Host: h\r\nConnection: close\r\n" + b"X-A: b\r\n" * (number - 2)
        head = b"GET /healthz HTTP/1.1\r\n" + lines + b"\r\n"
        return only(sent_and_answered(live.url, head)).status

    assert status(MAX_HEADERS) == 200
    assert status(MAX_HEADERS + 1) == 431


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /", b"a" * 65536),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX-A: ", b"a" * 65536),
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"a" * 20, b"a" * 65536),
        (b"GET / HTTP/1.1\r\nHost: h\r\n", b"X-A: b\r\n" * 8192),
        (b"", b"\r\n" * 32768),
        (CHUNKED + b"0\r\n", b"X-A: b\r\n" * 8192),
        (CHUNKED + b"0\r\nX-A: ", b"a" * 65536),
        (CHUNKED + b"1;a=", b"a" * 65536),
        (CHUNKED, b"1;" + b"a" * 4000 + b"\r\nb\r\n"),
        (CHUNKED, b"1\r\na\r\n" * 10_000),
    ],
    ids=["url", "value", "name", "headers", "blank", "trailers", "trailer", "extension",
         "extensions", "chunks"],
)  # fmt: skip
def test_what_never_ends_is_refused_and_not_kept(
    live: RunningService, start: bytes, more: bytes
) -> None:
    most = LINGER_HEAD_BYTES
    with connected(live.url) as connection:
        connection.sendall(start)
        # What is under way in the sockets' buffers counts as sent.
        send_until_closed(connection, more, most=most + 16 * 2**20)
    assert live.predict(adapter="a", inputs="x")["results"]


def test_trailers_are_discarded_and_never_headers(live: RunningService) -> None:
    request = CHUNKED + b"%x\r\n%s\r\n0\r\nX-Request-Id: trailer\r\n\r\n" % (len(BODY), BODY)
    answer = sent_and_answered(live.url, request + LAST_PREDICT)[0]
    assert answer.status == 200
    assert answer.headers["x-request-id"] != "trailer"


def test_a_refused_body_is_400_in_the_shape_of_its_route(live: RunningService) -> None:
    endless = b"0\r\nX-A: " + b"a" * (MAX_FRAMING_BYTES + 8192)
    own = only(sent_and_answered(live.url, CHUNKED + endless))
    assert (own.status, own.error["type"]) == (400, "malformed_request")
    tei = only(sent_and_answered(live.url, CHUNKED.replace(b"/v1/predict", b"/predict") + endless))
    assert (tei.status, json.loads(tei.body)["error_type"]) == (400, "Validation")


def test_small_chunks_with_extensions_are_read(live: RunningService) -> None:
    chunks = b"".join(b"1;n=v\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    request = CHUNKED.replace(b"Host: h", b"Host: h\r\nConnection: close") + chunks
    assert only(sent_and_answered(live.url, request)).status == 200


JUNK = {f"k{number}": 1 for number in range(50_000)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"inputs": [1] * 400_000}),
        ("/embed", {"inputs": [1] * 400_000}),
        ("/rerank", {"query": "x", "texts": [1] * 400_000}),
        ("/classify", {"input": [1] * 400_000}),
        ("/v1/rerank", {"query": "x", "documents": [1] * 400_000}),
        ("/v1/embeddings", {"input": [1] * 400_000}),
        ("/v1/predict", {"inputs": [1] * 400_000}),
        ("/v2/models/a/infer", {"inputs": [1] * 400_000}),
        ("/v2/models/a/infer", {"inputs": [], "outputs": [1] * 400_000}),
        ("/v1/predict", {"inputs": JUNK}),
        ("/v1/adapters/a/rollback", JUNK),
        ("/v1/adapters/a/traffic", JUNK),
        ("/v1/adapters/a/traffic", {"revision": "a", "percent": 1, "rule": JUNK}),
    ],
)
def test_what_is_wrong_a_very_large_number_of_times_is_refused_at_once(
    live: RunningService, path: str, body: dict[str, Any]
) -> None:
    method = "PUT" if path.endswith("/traffic") else "POST"
    response = live.client.request(method, path, json=body)
    assert response.status_code in (400, 413, 422), response.text
    assert response.elapsed.total_seconds() < 1
    assert len(response.text) < 1000


# Framing that another server could read differently.

CL, TE = b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"
START = b"POST /v1/predict HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
EMPTY = b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (START + CL + TE + b"\r\n" + EMPTY, 400),
        (START + TE + CL + b"\r\n" + EMPTY, 400),
        (START + CL + b"Content-Length: 6\r\n\r\nabcde", 400),
        (START + CL + CL + b"\r\nabcde", 400),
        (START + b"Content-Length: 5, 5\r\n\r\nabcde", 400),
        (START + b"Content-Length: +5\r\n\r\nabcde", 400),
        (START + b"Content-Length: 1_0\r\n\r\nabcdeabcde", 400),
        (START + b"Content-Length: 99999999999999999999\r\n\r\n", 400),
        (START + b"Transfer-Encoding: xchunked\r\n\r\n" + EMPTY, 501),
        (START + b"Transfer-Encoding: chunked, identity\r\n\r\n" + EMPTY, 400),
        (START + TE + TE + b"\r\n" + EMPTY, 400),
        (START + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + EMPTY, 501),
        (START.replace(b"HTTP/1.1", b"HTTP/1.0") + TE + b"\r\n" + EMPTY, 501),
        (START + b"Content-Length : 5\r\n\r\nabcde", 400),
        (START.replace(b"\r\n", b"\n") + b"\n", 400),
        (START + b"X-A: b\nX-B: c\r\n\r\n", 400),
        (START + b"X-A: b\rX-B: c\r\n\r\n", 400),
        (START + b"X-A: b\r\n folded\r\n\r\n", 400),
        (START + b"X-A: b\0c\r\n\r\n", 400),
        (START + b"X\0A: b\r\n\r\n", 400),
        (START + b": b\r\n\r\n", 400),
        (b"POST /v1/predict HTTP/1.1\r\n Host: h\r\n\r\n", 400),
        (b"POST /v1/predict HTTP/1.2\r\nHost: h\r\n\r\n", 400),
        (b"POST /v1 /predict HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"NONSENSE / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET http:// HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (START + TE + b"\r\n1\na\n0\n\n", 400),
        (START + TE + b"\r\n-1\r\na\r\n", 400),
        (START + TE + b"\r\n0x1\r\na\r\n", 400),
        (START + TE + b"\r\n1 \r\na\r\n", 400),
        (START + TE + b"\r\nffffffffffffffffff\r\na\r\n", 400),
        (START + TE + b"\r\n1\r\nab\r\n0\r\n\r\n", 400),
        (START + TE + b"\r\n0\r\nContent-Length: 5\r\n\r\n", 400),
    ],
)
def test_ambiguous_framing_is_refused_and_what_follows_is_not_answered(
    live: RunningService, request_: bytes, status: int
) -> None:
    answer = only(sent_and_answered(live.url, request_ + PREDICT))
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert answer.error["type"] in ("malformed_request", "not_implemented")


def test_http_1_0_is_answered_and_closed(live: RunningService) -> None:
    request = PREDICT.replace(b"HTTP/1.1", b"HTTP/1.0")
    answer = only(sent_and_answered(live.url, request))
    assert (answer.status, answer.headers["connection"]) == (200, "close")


# Pipelining.


@pytest.mark.slow
def test_pipelined_requests_are_answered_in_order(live: RunningService) -> None:
    gets = b"".join(
        b"GET /v1/adapters/n%d HTTP/1.1\r\nHost: h\r\n\r\n" % number for number in range(3000)
    )
    received = sent_and_answered(live.url, PREDICT + gets + PREDICT + LAST_PREDICT)
    assert [answer.status for answer in received] == [200] + [404] * 3000 + [200] * 2
    named = [answer.error["message"].split("'")[1] for answer in received[1:-2]]
    assert named == [f"n{number}" for number in range(3000)]


def test_a_refusal_comes_after_the_answers_before_it(live: RunningService) -> None:
    received = sent_and_answered(live.url, PREDICT + PREDICT + b"nonsense\r\n\r\n" + PREDICT)
    assert [answer.status for answer in received] == [200, 200, 400]
    received = sent_and_answered(live.url, PREDICT + CHUNKED + b"nonsense\r\n\r\n" + PREDICT)
    assert [answer.status for answer in received] == [200, 400]


@pytest.mark.slow
def test_a_client_that_pipelines_and_never_reads_is_disconnected(live: RunningService) -> None:
    before = ended(live, "slow_reader")
    get = b"GET /openapi.json HTTP/1.1\r\nHost: h\r\n\r\n"
    with connected(live.url, receive_buffer=4096) as connection:
        send_until_closed(connection, get * 500, most=MAX_PIPELINED_BYTES + 16 * 2**20)
    until(lambda: ended(live, "slow_reader") == before + 1)


# Times.


# What is sent, after how long the connection ends, and with which status and reason.
STALLS: tuple[tuple[bytes, float, int | None, str], ...] = (
    (b"", HEAD_SECONDS, None, "slow_head"),
    (b"GET /healthz HTT", HEAD_SECONDS, 408, "slow_head"),
    (b"GET /healthz HTTP/1.1\r\nHost: h\r\nX-A:", HEAD_SECONDS, 408, "slow_head"),
    (POST + b"Content-Length: 4000\r\n\r\n{", STALL_SECONDS, 408, "slow_body"),
    (CHUNKED + b"5\r\n{", STALL_SECONDS, 408, "slow_body"),
    (CHUNKED + b"1\r\n{\r\n0\r\n", STALL_SECONDS, 408, "slow_body"),
    (POST + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n", STALL_SECONDS, 408, "slow_body"),
    (PUT + b"Content-Length: 9\r\n\r\n{", STALL_SECONDS, 408, "slow_body"),
    # Answered before its body has come, which then must not stall either.
    (b"GET /no HTTP/1.1\r\nContent-Length: 9\r\n\r\n{", STALL_SECONDS, 404, "slow_body"),
)


@pytest.mark.slow
def test_what_stalls_is_closed_in_time(live: RunningService) -> None:
    before = {reason: ended(live, reason) for reason in ("slow_head", "slow_body")}

    def stalled(sent: bytes) -> tuple[list[Answer], float]:
        with connected(live.url) as connection:
            connection.sendall(sent)
            began = time.monotonic()
            received = [answer for answer in answers(connection) if answer.status != 100]
            return received, time.monotonic() - began

    with ThreadPoolExecutor(len(STALLS)) as pool:
        outcomes = list(pool.map(stalled, [sent for sent, *_ in STALLS]))
    for (sent, seconds, status, _), (received, waited) in zip(STALLS, outcomes, strict=True):
        assert [answer.status for answer in received] == ([] if status is None else [status]), sent
        assert seconds <= waited < seconds + 2, sent
        if status == 408:
            assert only(received).error["type"] == "request_timeout"
    for reason, number in before.items():
        stalls = sum(item[3] == reason for item in STALLS)
        until(lambda: ended(live, reason) == number + stalls)  # noqa: B023  # called at once


@pytest.mark.slow
def test_each_protocol_has_its_own_shape_of_a_slow_body(live: RunningService) -> None:
    start = b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        waiting = []
        for path in (b"/predict", b"/classify", b"/v2/models/a/infer"):
            connection = stack.enter_context(connected(live.url))
            connection.sendall(start % path + b"Content-Length: 9\r\n\r\n{")
            waiting.append(connection)
        tei, vllm, oip = (only(answers(connection)) for connection in waiting)
    assert (tei.status, json.loads(tei.body)["error_type"]) == (408, "Validation")
    assert (vllm.status, json.loads(vllm.body)["error"]["code"]) == (408, 408)
    assert oip.status == 408


def dripped(live: RunningService, head: bytes, body: bytes, *, step: int) -> tuple[Answer, float]:
    """The answer to a request whose body, or last headers, come in steps, ten a second; and when
    it came."""
    with connected(live.url) as connection:
        began = time.monotonic()
        connection.sendall(head)
        for at in range(0, len(body), step):
            connection.sendall(body[at : at + step])
            if select.select([connection], [], [], 0.1)[0]:
                break
        received = connection.recv(65536)
        waited = time.monotonic() - began
        connection.shutdown(socket.SHUT_WR)
        status = int(received.split()[1])
        return Answer(status, {}, received.partition(b"\r\n\r\n")[2]), waited


@pytest.mark.slow
def test_a_drip_is_refused_and_a_slow_line_is_not(live: RunningService) -> None:
    drip, seconds = dripped(live, PUT + b"Content-Length: 9000\r\n\r\n", b"x" * 9000, step=10)
    assert drip.status == 408
    assert STALL_SECONDS <= seconds < STALL_SECONDS + 2
    # Twice the pace, for several periods.
    slow, seconds = dripped(live, PUT + b"Content-Length: 80000\r\n\r\n", b"x" * 80_000, step=2000)
    assert (slow.status, slow.error["type"]) == (422, "adapter_invalid")
    assert seconds > 2 * STALL_SECONDS


@pytest.mark.parametrize("head", [POST, PUT])
def test_a_body_that_breaks_is_not_kept(live: RunningService, head: bytes) -> None:
    """What had come of it waited for the garbage collector, outside of all bounds."""
    broken = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"ffff\r\n" + b"x" * 0xFFFF + b"\r\nzz"
    gc.collect()
    before = sum(type(item) is Request for item in gc.get_objects())
    gc.disable()
    try:
        for _ in range(4):
            (answer,) = sent_and_answered(live.url, broken + b"\r\n")
            assert answer.status == 400
        until(lambda: sum(type(item) is Request for item in gc.get_objects()) <= before + 1)
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("idle", [0.0, STALL_SECONDS])
def test_every_body_of_a_connection_has_its_own_period(live: RunningService, idle: float) -> None:
    head, middle = len(PREDICT) - len(BODY), len(PREDICT) - 5
    with connected(live.url) as connection:
        for _ in range(4):
            connection.sendall(PREDICT[:head])
            time.sleep(STALL_SECONDS / 4)
            connection.sendall(PREDICT[head:middle])
            time.sleep(STALL_SECONDS / 4)
            connection.sendall(PREDICT[middle:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(idle)


@pytest.mark.slow
def test_dripped_headers_end_in_time(live: RunningService) -> None:
    answer, seconds = dripped(live, b"GET / HTTP/1.1\r\n", b"X-A: b\r\n" * 90, step=8)
    assert answer.status == 408
    assert HEAD_SECONDS <= seconds < HEAD_SECONDS + 2


@pytest.mark.slow
def test_an_idle_connection_is_kept_and_a_slow_second_head_is_not(live: RunningService) -> None:
    with connected(live.url) as connection:
        connection.sendall(PREDICT)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(HEAD_SECONDS + 1)
        connection.sendall(PREDICT)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /healthz")
        assert only(answers(connection)).status == 408


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_disconnected(tmp_path: Path) -> None:
    with serve(tmp_path, STALL_SECONDS="1", MIN_BYTES_PER_SECOND="1000") as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        get = b"GET /openapi.json HTTP/1.1\r\nHost: h\r\n\r\n"
        with connected(live.url, receive_buffer=4096) as connection:
            # More answers than the sockets' buffers hold.
            connection.sendall(get * 300)
            until(lambda: ended(live, "slow_reader") == 1)
            assert seconds_until_closed(connection) < 5


# Refused clients can read why.


def urllib_status(url: str, body: bytes, **headers: str) -> int:
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


JSON = {"Content-Type": "application/json"}
LARGE = b"x" * (9 * 2**20)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/predict", "/predict", "/classify", "/v2/models/a/infer"])
def test_clients_that_send_all_first_read_the_413(live: RunningService, path: str) -> None:
    for _ in range(3):
        assert urllib_status(live.url + path, LARGE, **JSON) == 413
        assert httpx.post(live.url + path, content=LARGE, headers=JSON).status_code == 413
        chunks = (LARGE[at : at + 65536] for at in range(0, len(LARGE), 65536))
        assert httpx.post(live.url + path, content=chunks, headers=JSON).status_code == 413


def test_clients_that_send_all_first_read_other_refusals(tmp_path: Path) -> None:
    with serve(tmp_path, API_KEYS="key") as live:
        assert urllib_status(f"{live.url}/v1/predict", LARGE, **JSON) == 401
        assert urllib_status(f"{live.url}/nowhere", LARGE, **JSON, **{"X-API-Key": "key"}) == 404
        body = LARGE[: LINGER_HEAD_BYTES // 2]
        assert urllib_status(f"{live.url}/v1/predict?{'a' * 9000}", body, **JSON) == 414
        assert urllib_status(f"{live.url}/v1/predict", body, **JSON, A="b" * 40_000) == 431


def test_a_refusal_before_the_body_sends_no_100(live: RunningService) -> None:
    expecting = POST + b"Expect: 100-continue\r\n"
    refused = only(sent_and_answered(live.url, expecting + b"Content-Length: 9000000\r\n\r\n"))
    assert (refused.status, refused.headers["connection"]) == (413, "close")
    with connected(live.url) as connection:
        connection.sendall(expecting + b"Connection: close\r\nContent-Length: 39\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert only(answers(connection)).status == 200


def test_a_small_unread_body_does_not_end_the_connection(live: RunningService) -> None:
    request = PREDICT.replace(b"/v1/predict", b"/nowhere")
    at = len(request) - len(BODY)
    received = sent_and_answered(live.url, request[:at], request[at:] + LAST_PREDICT)
    assert [answer.status for answer in received] == [404, 200]


# Bodies in flight.


@pytest.mark.slow
def test_bodies_in_flight_have_one_bound(tmp_path: Path) -> None:
    size, most = 2**20, 4 * 2**20
    with serve(
        tmp_path,
        MAX_BODY_BYTES=str(size),
        MAX_UPLOAD_BYTES=str(size),
        MAX_BODY_BYTES_IN_FLIGHT=str(most),
        DEFAULT_ADAPTER="a",
    ) as live, ExitStack() as stack:  # fmt: skip
        live.put("a", make_adapter(make_backbone(), seed=1))
        head = POST + b"Content-Length: %d\r\n\r\n" % size
        stalled = [stack.enter_context(connected(live.url)) for _ in range(4)]
        for connection in stalled:
            connection.sendall(head + b"x" * (size - 1))
        held = ("idspam_body_bytes", frozenset({("process", "service"), ("place", "memory")}))
        until(lambda: live.series()[held] == 4 * (size - 1))

        refused = live.client.post("/v1/predict", content=b"x" * size, headers=JSON)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "overloaded"
        chunks = (b"x" * 65536 for _ in range(8))
        assert live.client.post("/v1/predict", content=chunks, headers=JSON).status_code == 429
        tei = live.client.post("/predict", content=b"x" * size, headers=JSON)
        assert (tei.status_code, tei.json()["error_type"]) == (429, "Overloaded")
        # Ordinary requests and uploads are not kept out.
        assert live.predict(adapter="a", inputs="x")["results"]
        assert live.client.put("/v1/adapters/b", content=b"x" * size).status_code == 422

        for connection in stalled:
            connection.close()
        until(lambda: live.series()[held] == 0)
        large = json.dumps({"adapter": "a", "inputs": ["x" * 900_000]}).encode()
        assert live.client.post("/v1/predict", content=large, headers=JSON).status_code == 200


def test_bodies_of_one_key_leave_room_for_those_of_others(tmp_path: Path) -> None:
    size = 2**20
    with serve(
        tmp_path,
        MAX_BODY_BYTES=str(size),
        MAX_UPLOAD_BYTES=str(size),
        MAX_BODY_BYTES_IN_FLIGHT=str(8 * size),
        API_KEYS="calm,greedy",
        ADMIN_KEYS="admin",
        DEFAULT_ADAPTER="a",
    ) as live, ExitStack() as stack:  # fmt: skip
        admin, calm, greedy = (
            {"Authorization": f"Bearer {key}"} for key in ("admin", "calm", "greedy")
        )
        live.put("a", make_adapter(make_backbone(), seed=1), **admin)
        head = POST + b"Authorization: Bearer greedy\r\nContent-Length: %d\r\n\r\n" % size
        for _ in range(6):
            connection = stack.enter_context(connected(live.url))
            connection.sendall(head + b"x" * (size - 1))
        budget = live.service.body_budget
        until(lambda: budget.bytes_in["memory"] == 6 * (size - 1))

        large = json.dumps({"adapter": "a", "inputs": "x" * 900_000}).encode()
        refused = live.client.post("/v1/predict", content=large, headers=JSON | greedy)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "of this client's bodies are in flight" in error_of(refused)["message"]
        assert live.client.post("/v1/predict", content=large, headers=JSON | calm).is_success
        # A stream holds as much as its lines.
        answer = live.client.post(
            "/v1/predict/stream",
            content=(large.replace(b'"inputs"', b'"text"') + b"\n") * 4,
            headers=calm | {"Content-Type": "application/x-ndjson"},
        )
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [line["adapter"] for line in lines] == ["a"] * 4


def test_the_only_body_of_a_client_may_take_all_that_is_free() -> None:
    budget = BodyBudget(100)
    one, another, other = (budget.share_of({"idspam.client": client}) for client in ("a", "a", "b"))
    one.take(90, "memory")
    with pytest.raises(Overloaded, match="of this client's bodies"):
        another.take(1, "memory")
    other.take(10, "memory")
    with pytest.raises(Overloaded, match="no room for 1 more"):
        other.take(1, "memory")
    # What waits on the disk is counted for itself.
    another.take(75, "disk")
    one.release()
    another.take(30, "memory")
    other.release()
    another.release()
    assert budget.bytes_in == {"memory": 0, "disk": 0}


def test_clients_share_the_bound_and_leave_room_for_another() -> None:
    budget = BodyBudget(700)
    shares = {
        client: [budget.share_of({"idspam.client": client}) for _ in range(700)] for client in "ab"
    }
    for pair in zip(*shares.values(), strict=True):
        for share in pair:
            with suppress(Overloaded):
                share.take(1, "memory")
    taken = [budget.of_client(client, "memory") for client in "ab"]
    assert taken == [300, 300]


def test_without_keys_only_the_whole_bound_counts() -> None:
    budget = BodyBudget(100)
    for _ in range(4):
        budget.share_of({}).take(25, "memory")
    with pytest.raises(Overloaded, match="no room for 1 more"):
        budget.share_of({}).take(1, "memory")


@pytest.mark.slow
def test_uploads_in_flight_have_the_same_bound_on_disk(tmp_path: Path) -> None:
    size = 2**20
    with serve(
        tmp_path,
        MAX_BODY_BYTES=str(size),
        MAX_UPLOAD_BYTES=str(size),
        MAX_BODY_BYTES_IN_FLIGHT=str(2 * size),
    ) as live, ExitStack() as stack:  # fmt: skip
        head = b"PUT /v1/adapters/b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size
        for _ in range(2):
            connection = stack.enter_context(connected(live.url))
            connection.sendall(head + b"x" * (size - 1))
        stored = ("idspam_body_bytes", frozenset({("process", "service"), ("place", "disk")}))
        until(lambda: live.series()[stored] == 2 * (size - 1))
        refused = live.client.put("/v1/adapters/b", content=b"x" * size)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


def test_the_bound_of_bodies_in_flight_admits_the_largest_body() -> None:
    key, largest = "IDSPAM_MAX_BODY_BYTES_IN_FLIGHT", 256 * 2**20 + 64 * 1024
    for workers in (0, 1, 16):
        assert read_settings({"IDSPAM_WORKERS": str(workers)}).body_bytes_share >= largest
    two = {"IDSPAM_WORKERS": "2", key: str(2 * largest)}
    assert read_settings(two).body_bytes_share == largest
    with pytest.raises(InvalidSettings, match=key):
        read_settings(two | {key: str(2 * largest - 1)})


# Connections.


def get_health(connection: socket.socket) -> bytes:
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
    return connection.recv(65536)


def test_idle_connections_make_room_oldest_first(tmp_path: Path) -> None:
    with serve(tmp_path, MAX_CONNECTIONS="10") as live, ExitStack() as stack:
        live.client.close()
        idle = [stack.enter_context(connected(live.url)) for _ in range(10)]
        for connection in idle:
            assert get_health(connection).startswith(b"HTTP/1.1 200")
        # Used again: now it has waited for the shortest time.
        get_health(idle[0])
        for _ in range(4):
            assert get_health(stack.enter_context(connected(live.url))).startswith(b"HTTP/1.1 200")
        for connection in idle[1:5]:
            assert seconds_until_closed(connection) < 1
        assert get_health(idle[0]).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_connections_beyond_the_limit_get_503(tmp_path: Path) -> None:
    with serve(tmp_path, MAX_CONNECTIONS="5") as live, ExitStack() as stack:
        live.put("a", make_adapter(make_backbone(), seed=1))
        for _ in range(5):
            connection = stack.enter_context(connected(live.url))
            connection.sendall(POST + b"Content-Length: 40\r\n\r\n{")
            time.sleep(0.05)
        refused = only(sent_and_answered(live.url, PREDICT))
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        assert refused.error == {
            "type": "unavailable", "message": "too many connections", "details": []
        }  # fmt: skip


@pytest.mark.slow
def test_a_flood_of_connections_does_not_keep_others_out(tmp_path: Path) -> None:
    with serve(tmp_path, MAX_CONNECTIONS="50") as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        done, opened = threading.Event(), 0

        def flood() -> None:
            nonlocal opened
            held: list[socket.socket] = []
            while not done.is_set():
                with connected(live.url) as connection:
                    held.append(connection.dup())
                opened += 1
                if len(held) > 300:
                    held.pop(0).close()
            for each in held:
                each.close()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for _ in range(20):
                assert only(sent_and_answered(live.url, LAST_PREDICT)).status == 200
        finally:
            done.set()
            thread.join()
        assert opened > 50


@pytest.mark.parametrize(
    "setting",
    ["HEADER_SECONDS", "STALL_SECONDS", "MIN_BYTES_PER_SECOND", "MAX_CONNECTIONS",
     "MAX_BODY_BYTES_IN_FLIGHT"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["0", "-1", "many", "", "1e99"])
def test_bad_bounds_are_named(setting: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=f"IDSPAM_{setting}"):
        read_settings({f"IDSPAM_{setting}": value})


@pytest.mark.slow
def test_connections_are_counted(live: RunningService) -> None:
    before = live.metric("idspam_connections", process="service")
    with connected(live.url), connected(live.url):
        until(lambda: live.metric("idspam_connections", process="service") == before + 2)
    until(lambda: live.metric("idspam_connections", process="service") == before)


def test_pipes_of_other_libraries_work(live: RunningService) -> None:
    """A connection of the standard library, which sends head and body apart."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    for _ in range(5):
        connection.request("POST", "/v1/predict", BODY, JSON)
        response: Any = connection.getresponse()
        assert (response.status, bool(response.read())) == (200, True)
    connection.close()
