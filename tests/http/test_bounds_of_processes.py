"""Attacks on the real processes, with and without workers, and how they end with clients stuck."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.raw_http import connected, seconds_until_closed, send_until_closed
from tests.support.service_process import ReadyService, body_of, ready_service
from tests.support.tiny_models import make_adapter, save_backbone

# Each test starts processes.
pytestmark = pytest.mark.slow

CONNECTIONS = 25
MAX_GROWTH_BYTES = 100 * 2**20
POST = b"POST /v1/predict HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
PUT = b"PUT /v1/adapters/b HTTP/1.1\r\nHost: h\r\n"
FLOODS = {
    "url": (b"GET /", b"a" * 262144),
    "header": (b"GET / HTTP/1.1\r\nHost: h\r\nX-A: ", b"a" * 262144),
    "headers": (b"GET / HTTP/1.1\r\nHost: h\r\n", b"X-A: b\r\n" * 32768),
    "trailers": (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n" * 32768),
}
STALLS = {
    "nothing": b"",
    "head": b"GET /healthz HTTP/1.1\r\nX-A",
    "body": POST + b"Content-Length: 4000\r\n\r\n{",
    "upload": PUT + b"Content-Length: 4000000\r\n\r\n" + b"x" * 1_000_000,
}


@pytest.fixture(scope="module", params=[0, 2])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReadyService]:
    backbone = save_backbone(tmp_path_factory.mktemp("backbone"))
    adapter = make_adapter(load_backbone(str(backbone), device="cpu"), seed=1)
    with ready_service(
        backbone,
        tmp_path_factory.mktemp("service"),
        workers=request.param,
        HEADER_SECONDS="1",
        STALL_SECONDS="1",
    ) as service:
        httpx.put(f"{service.url}/v1/adapters/a", content=serialize(adapter), timeout=20)
        yield service


def memory(running: ReadyService) -> int:
    pids = [running.process.pid, *running.children().values()]
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return 4096 * sum(pages)


def predict(running: ReadyService) -> int:
    body = body_of("a", "hello you")
    return httpx.post(f"{running.url}/v1/predict", json=body, timeout=20).status_code


@pytest.mark.parametrize("kind", FLOODS)
def test_floods_are_cut_off_in_bounded_memory(running: ReadyService, kind: str) -> None:
    start, more = FLOODS[kind]
    before, taken = memory(running), []

    def attack() -> None:
        with connected(running.url) as connection:
            connection.sendall(start)
            taken.append(send_until_closed(connection, more, most=100 * 2**20))

    threads = [threading.Thread(target=attack) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    assert predict(running) == 200
    peak = memory(running)
    for thread in threads:
        thread.join()
    assert len(taken) == CONNECTIONS
    assert max(peak, memory(running)) - before < MAX_GROWTH_BYTES


def test_stalls_are_closed_in_time(running: ReadyService) -> None:
    with ExitStack() as stack:
        stalled = []
        for sent in list(STALLS.values()) * CONNECTIONS:
            stalled.append(stack.enter_context(connected(running.url)))
            stalled[-1].sendall(sent)
        assert predict(running) == 200
        began = time.monotonic()
        for connection in stalled:
            seconds_until_closed(connection)
        assert time.monotonic() - began < 5


def test_the_service_ends_soon_with_stuck_clients_and_answers_the_others(
    running: ReadyService,
) -> None:
    with ExitStack() as stack:
        stuck: list[socket.socket] = []
        for sent in list(STALLS.values()) * 5:
            stuck.append(stack.enter_context(connected(running.url)))
            stuck[-1].sendall(sent)
        for _ in range(5):
            # Reads nothing of its answers.
            connection = stack.enter_context(connected(running.url, receive_buffer=4096))
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: h\r\n\r\n" * 200)
            idle = stack.enter_context(connected(running.url))
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            assert idle.recv(65536)
        answered: list[httpx.Response] = []
        body = body_of("a", *["the card is not good " * 12] * 300)
        asking = threading.Thread(
            target=lambda: answered.append(
                httpx.post(f"{running.url}/v1/predict", json=body, timeout=60)
            )
        )
        asking.start()
        # A busy machine takes a while to accept it; what comes after the signal is refused.
        time.sleep(1)
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
        seconds = time.monotonic() - began
        asking.join()
        assert [answer.status_code for answer in answered] == [200]
        # Two seconds for the stuck ones; the rest is for the request and the end of the processes.
        assert seconds < 8, seconds
        for connection in stuck:
            assert seconds_until_closed(connection) < 1
