"""POST /v1/predict/stream on the real service."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http.openapi.schemas import Result, StreamError, StreamQuery
from service.http.stream import job
from service.http.stream.job import Job
from service.http.stream.lines import Line
from service.http.stream.portions import LineReader
from tests.support.http_service import Brake, RunningService, error_of, serve, until
from tests.support.key_files import bearer, write_keys
from tests.support.open_stream import OpenStream
from tests.support.raw_http import connected, sent_and_answered
from tests.support.tiny_models import make_adapter, make_backbone

STALL_SECONDS = 1.5
MAX_LINE = 2**16


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(
        tmp_path_factory.mktemp("adapters"),
        STALL_SECONDS=str(STALL_SECONDS),
        MAX_BODY_BYTES=str(MAX_LINE),
    ) as running:
        backbone = make_backbone()
        running.put("a", make_adapter(backbone))
        running.put("b", make_adapter(backbone, seed=1, labels=("x", "y", "z")))
        running.put("short", make_adapter(backbone, seed=2, max_length=8))
        running.put("tags", make_adapter(backbone, seed=3, activation="sigmoid"))
        yield running


def texts(number: int) -> list[str]:
    return ["free win now " * (index % 7) + str(index) for index in range(number)]


def weights_of(result: dict[str, Any]) -> list[float]:
    """Takes the weights out of an answer, if it explains itself."""
    explained = result.get("explanation", {"words": (), "special_tokens": {"weight": None}})
    weights = [item.pop("weight") for item in explained["words"]]
    return [*weights, explained["special_tokens"].pop("weight") or 0.0]


@pytest.mark.slow
def test_each_line_is_answered_in_order_as_by_predict(live: RunningService) -> None:
    lines: list[Any] = [
        "free win",
        {"text": "my card", "adapter": "b", "id": "1", "top_k": 1},
        {"text": "my card", "text_pair": "is bad", "explain": True},
        {"text": "my card", "text_pair": "is bad", "explain": "occlusion", "id": "hidden"},
        {"text": "free " * 50, "adapter": "short"},
        {"text": "hello", "adapter": "tags"},
        {"text": "hello", "abstain_below": 1.0},
        *texts(300),
    ]
    with OpenStream(live.url) as stream:
        answers = stream.answers(*lines)
        assert stream.response.status == 200
        assert stream.response.headers["content-type"] == "application/x-ndjson"
    assert len(answers) == len(lines)
    for line, answer in zip(lines, answers, strict=True):
        Result.model_validate(answer)
        item = {"text": line} if isinstance(line, str) else dict(line)
        options = {
            name: item.pop(name) for name in ("top_k", "explain", "abstain_below") if name in item
        }
        (expected,) = live.predict(adapter="a", inputs=[item], **options)["results"]
        numbers = [expected.pop("score"), *(score.pop("score") for score in expected["scores"])]
        found = [answer.pop("score"), *(score.pop("score") for score in answer["scores"])]
        assert found == pytest.approx(numbers, abs=1e-5)
        assert weights_of(answer) == pytest.approx(weights_of(expected), abs=1e-5)
        assert answer == expected


def test_a_line_is_answered_before_the_next_one_is_sent(live: RunningService) -> None:
    with OpenStream(live.url) as stream:
        for text in texts(20):
            stream.send({"text": text, "id": text})
            assert stream.line()["id"] == text
        stream.end()
        assert stream.rest() == []


@pytest.mark.parametrize(
    ("line", "type", "part"),
    [
        (b"{", "malformed_request", "the line is not JSON"),
        (b"[1]", "invalid_request", "line: expected a string or an object"),
        (b"3", "invalid_request", "line: expected a string or an object"),
        (b'{"text": 3}', "invalid_request", "text: Input should be a valid string"),
        (b'{"text": "x", "tect": 3, "top_k": 0}', "invalid_request", "top_k"),
        (b'{"text": "x", "adapters": ["a", "b"]}', "invalid_request", "adapters: Extra inputs"),
        (
            b'{"text": "x", "adapter": "a", "adapters": ["b"]}',
            "invalid_request",
            "adapters: Extra inputs",
        ),
        (b'{"text": "x", "adapter": "none"}', "adapter_not_found", "none"),
        (b'{"text": "x", "adapter": "a@77"}', "revision_not_found", "77"),
        (b'"' + b"x" * MAX_LINE + b'"', "too_large", f"longer than {MAX_LINE} bytes"),
        (b'{"text": "x\xff"}', "malformed_request", "the line is not JSON"),
        (
            b'{"text": "' + b"free " * 50 + b'", "adapter": "short", "truncate": false}',
            "invalid_request",
            "text: 52 tokens",
        ),
        (
            b'{"text": "x", "adapter": "tags", "abstain_below": 0.5}',
            "invalid_request",
            "text: adapter 'tags' gives several",
        ),
        (b"{" + b",".join(b'"%d":1' % n for n in range(500)) + b"}", "invalid_request", "fields"),
    ],
)
def test_a_bad_line_has_an_error_and_the_others_are_answered(
    live: RunningService, line: bytes, type: str, part: str
) -> None:
    with OpenStream(live.url) as stream:
        stream.send_bytes(b'{"text": "before", "id": "1"}\n\n' + line + b'\n{"text": "after"}\n')
        stream.end()
        before, bad, after = stream.rest()
    assert before["id"] == "1"
    assert "label" in after
    error = StreamError.model_validate(bad)
    assert (error.line, error.error.type) == (3, type)
    assert part in " ".join([error.error.message, *error.error.details])


def test_a_line_needs_an_adapter_of_its_own_or_of_the_url(live: RunningService) -> None:
    with OpenStream(live.url, "top_k=1") as stream:
        missing, own = stream.answers("text", {"text": "text", "adapter": "b"})
    assert missing["error"]["details"] == ["adapter: missing, and the URL names none"]
    assert len(own["scores"]) == 1


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("top_k=0", "top_k"),
        ("explain=perhaps", "explain"),
        ("timeout_ms=x", "timeout_ms"),
        ("abstain_below=2", "abstain_below"),
        ("tpo_k=1", "tpo_k"),
        ("adapter=", "adapter"),
    ],
)
def test_a_bad_query_is_refused_before_any_line(
    live: RunningService, query: str, fault: str
) -> None:
    answer = httpx.post(
        f"{live.url}/v1/predict/stream?{query}",
        content=b'"x"\n',
        headers={"content-type": "application/x-ndjson"},
    )
    assert answer.status_code == 422
    assert error_of(answer)["details"][0].startswith(f"{fault}:")


def test_another_content_type_is_refused(live: RunningService) -> None:
    for headers in (
        {"content-type": "application/json"},
        {"content-type": "application/x-ndjson", "content-encoding": "gzip"},
        {},
    ):
        answer = httpx.post(f"{live.url}/v1/predict/stream", content=b"x", headers=headers)
        assert answer.status_code == 415, headers


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(live: RunningService) -> None:
    with OpenStream(live.url, headers={"Expect": "100-continue"}) as stream:
        assert stream.socket.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert len(stream.answers("text", "text")) == 2


def test_an_empty_stream_has_an_empty_answer(live: RunningService) -> None:
    with OpenStream(live.url) as stream:
        assert stream.answers() == []


@pytest.mark.slow
def test_a_silent_client_is_ended_and_told_why(live: RunningService) -> None:
    with OpenStream(live.url) as stream:
        stream.send("text")
        assert "label" in stream.line()
        began = time.monotonic()
        # A drop now and then does not count, nor do blank lines.
        for _ in range(3):
            time.sleep(STALL_SECONDS / 4)
            stream.send_bytes(b"\n ")
        (last,) = stream.rest()
        assert STALL_SECONDS * 0.9 <= time.monotonic() - began < STALL_SECONDS + 3
    assert last["line"] is None
    assert last["error"]["type"] == "request_timeout"


@pytest.mark.slow
def test_a_client_that_waits_for_its_answers_is_not_silent(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, STALL_SECONDS="1") as running:
        running.put("a", make_adapter(make_backbone()))
        brake.on()
        with OpenStream(running.url) as stream:
            stream.send("text")
            time.sleep(3)
            brake.off()
            assert "label" in stream.line()
            stream.end()
            assert stream.rest() == []


@pytest.mark.slow
def test_no_more_is_read_than_is_answered(tmp_path: Path) -> None:
    """Real back-pressure: a client that does not stop is stopped by TCP."""
    brake = Brake()
    with serve(tmp_path, load=brake.load, STALL_SECONDS="60") as running:
        running.put("a", make_adapter(make_backbone()))
        brake.on()
        with OpenStream(running.url) as stream:
            lines = b'{"text": "free win now"}\n' * 2000
            stream.socket.settimeout(1.0)

            def send_all() -> None:
                # Far more than the buffers of the system hold.
                for _ in range(400):
                    stream.send_bytes(lines)

            with pytest.raises(TimeoutError):
                send_all()
            held = running.service.body_budget.bytes_in["memory"]
            assert held < 2**20, held
            brake.off()
        until(lambda: running.service.body_budget.bytes_in["memory"] == 0)


def test_a_client_of_http_1_0_is_told_that_a_stream_needs_1_1(live: RunningService) -> None:
    head = "POST /v1/predict/stream?adapter=a HTTP/1.0\r\nContent-Type: application/x-ndjson"
    request = f'{head}\r\nContent-Length: 4\r\n\r\n"a"\n'
    (answer,) = sent_and_answered(live.url, request.encode())
    assert (answer.status, answer.error["type"]) == (400, "malformed_request")
    assert "HTTP/1.1" in answer.error["message"]


@pytest.mark.slow
def test_lines_for_which_there_is_no_room_end_the_stream_after_what_was_answered(
    tmp_path: Path,
) -> None:
    brake = Brake()
    limits: dict[str, Any] = {
        "MAX_BODY_BYTES": str(2**21),
        "MAX_UPLOAD_BYTES": str(2**21),
        "MAX_BODY_BYTES_IN_FLIGHT": str(2**21 + 2**16),
    }
    with serve(tmp_path, load=brake.load, **limits) as running:
        running.put("a", make_adapter(make_backbone()))
        budget, loop = running.service.body_budget, running.service.starting.get_loop()
        brake.on()
        with OpenStream(running.url) as stream, connected(running.url) as other:
            stream.send("hello")
            until(lambda: brake.holds)
            # Another body leaves 160 KB.
            head = b"POST /v1/predict HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
            length = b"Content-Length: %d\r\n\r\n" % 2**21
            other.sendall(head + length + b" " * (2**21 - 10_000))
            until(lambda: budget.limit - budget.bytes_in["memory"] < 200_000)
            # While the loop is busy, so that they come in one piece.
            loop.call_soon_threadsafe(time.sleep, 0.5)
            stream.send(*["good card " * 9000] * 2)
            time.sleep(1)
            brake.off()
            answered, refused = stream.rest()
    assert answered["label"]
    assert refused["error"]["type"] == "overloaded"


def test_a_client_that_leaves_stops_the_work(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load) as running:
        running.put("a", make_adapter(make_backbone()))
        brake.on()
        with OpenStream(running.url) as stream:
            stream.send(*texts(1000))
            until(lambda: running.service.health().details["waiting_entries"] != 0)
        until(lambda: running.service.busy_jobs == 0)
        until(lambda: running.service.health().details["waiting_entries"] == 0)
        brake.off()
        until(
            lambda: (
                running.metric(
                    "idspam_requests_total", route="/v1/predict/stream", outcome="disconnected"
                )
                == 1
            )
        )


@pytest.mark.slow
def test_overload_makes_a_stream_wait_and_fails_no_line(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, MAX_WAITING_TOKENS="700") as running:
        running.put("a", make_adapter(make_backbone()))
        brake.on()
        with OpenStream(running.url) as stream:
            lines = texts(500)
            sending = threading.Thread(target=stream.send, args=lines)
            sending.start()
            time.sleep(0.5)
            brake.off()
            sending.join()
            stream.end()
            answers = stream.rest()
        assert len(answers) == 500
        assert all("label" in answer for answer in answers)
        refused = {
            value
            for (name, _), value in running.series().items()
            if name == "idspam_overload_refusals_total"
        }
        assert refused == {0.0}


@pytest.mark.slow
def test_a_line_has_a_deadline_of_its_own(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load) as running:
        running.put("a", make_adapter(make_backbone()))
        brake.on()
        with OpenStream(running.url) as stream:
            stream.send("first")
            time.sleep(0.3)
            stream.send({"text": "late", "id": "late", "timeout_ms": 200}, "patient")
            stream.end()
            time.sleep(0.5)
            brake.off()
            first, late, patient = stream.rest()
    assert "label" in first
    assert (late["id"], late["line"], late["error"]["type"]) == ("late", 2, "deadline_exceeded")
    assert "label" in patient


@pytest.mark.slow
def test_lines_that_were_read_are_answered_when_the_service_drains(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load) as running:
        running.put("a", make_adapter(make_backbone()))
        brake.on()
        with OpenStream(running.url) as stream:
            stream.send(*texts(100))
            until(lambda: brake.holds)
            service = running.service
            loop = service.starting.get_loop()
            loop.call_soon_threadsafe(service.drains.set)
            time.sleep(1)
            brake.off()
            answers = stream.rest()
        assert len(answers) == 101
        assert all("label" in answer for answer in answers[:-1])
        assert answers[-1]["line"] is None
        assert answers[-1]["error"]["type"] == "unavailable"


@pytest.mark.slow
def test_a_drain_that_ends_too_late_fails_all_lines_in_flight_without_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, DRAIN_SECONDS="0.2") as running:
        running.put("a", make_adapter(make_backbone()))
        brake.on()
        with OpenStream(running.url) as stream:
            first, *others = texts(300)
            stream.send(first)
            until(lambda: brake.holds)
            stream.send(*others)
            until(lambda: running.service.health().details["waiting_entries"] != 0)
            loop = running.service.starting.get_loop()
            loop.call_soon_threadsafe(lambda: loop.create_task(running.service.drain()))
            answers = stream.rest()
        brake.off()
    gc.collect()
    assert [answer["error"]["type"] for answer in answers] == ["unavailable"]
    assert "never retrieved" not in caplog.text


REFUSED = (b"x", b"5", b"[]", b'{"text": 5}', b'{"no": "text"}', b'{"text": "x", "label": "ham"}')


@pytest.mark.parametrize("line", [*REFUSED, b'{"text": "x"}'])
def test_a_refused_line_leaves_no_garbage_in_circles(line: bytes) -> None:
    """Where refused lines wait for answers, it would be old by the time that it is garbage."""
    reader = LineReader(StreamQuery(), timeout_ms=1000, max_bytes=100)
    reader.read(Line(1, line, len(line)))
    gc.collect()
    for number in range(100):
        item, _ = reader.read(Line(number, line, len(line)))
        assert item.fault is not None
    del item
    assert gc.collect() == 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["leaves", "leaves in a line", "is too slow"])
def test_a_stream_that_ends_early_is_not_kept(tmp_path: Path, end: str) -> None:
    """It held its lines, up to 8 MiB, outside of the bound on bodies."""
    with serve(tmp_path, STALL_SECONDS="0.2") as running:
        running.put("a", make_adapter(make_backbone()))
        gc.collect()
        gc.disable()
        try:
            with OpenStream(running.url) as stream:
                stream.send("x")
                assert stream.line()["label"]
                if end == "leaves in a line":
                    stream.send_bytes(b'"' + b"x" * 100_000)
                if end == "is too slow":
                    assert stream.line()["error"]["type"] == "request_timeout"
            until(lambda: not any(type(item) is Job for item in gc.get_objects()))
        finally:
            gc.enable()


@pytest.mark.slow
def test_jobs_without_lines_take_no_room_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "LINES", 256)
    brake = Brake()
    with serve(tmp_path, load=brake.load) as running, ExitStack() as idle:
        running.put("a", make_adapter(make_backbone()))
        for _ in range(7):
            stream = idle.enter_context(OpenStream(running.url))
            stream.send("x")
            assert "label" in stream.line()
        brake.on()
        # It holds the device, so that no line is taken.
        holding = threading.Thread(target=running.predict, kwargs={"adapter": "a", "inputs": "x"})
        holding.start()
        until(lambda: brake.holds)
        with OpenStream(running.url) as stream:
            stream.send(*["x"] * 300)
            until(lambda: int(running.service.health().details["waiting_entries"]) > 100)
            assert running.service.busy_jobs == 1
            brake.off()
            stream.end()
            assert len(stream.rest()) == 300
        holding.join()
        until(lambda: running.service.busy_jobs == 0)


def test_a_line_gets_the_revision_that_is_current_when_it_is_sent(live: RunningService) -> None:
    with OpenStream(live.url, "adapter=swapped") as stream:
        for seed in (5, 6, 7):
            revision = live.put("swapped", make_adapter(make_backbone(), seed=seed))
            stream.send("text")
            assert stream.line()["revision"] == revision
        stream.end()


def test_a_revoked_key_ends_its_stream(tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    tokens = write_keys(keys, admin={}, job={"scopes": ["predict"]})
    with serve(tmp_path / "adapters", KEYS_FILE=str(keys), wait=False) as running:
        until(lambda: running.client.get("/readyz").status_code == 200)
        running.put("a", make_adapter(make_backbone()), **bearer(tokens["admin"]))
        with OpenStream(running.url, headers=bearer(tokens["job"])) as stream:
            stream.send("text")
            assert "label" in stream.line()
            lines = [json.loads(line) for line in keys.read_text().splitlines()]
            kept = [line for line in lines if line["name"] != "job"]
            keys.write_text("".join(json.dumps(line) + "\n" for line in kept))
            loop = running.service.starting.get_loop()
            asyncio.run_coroutine_threadsafe(running.service.guard.reload(), loop).result(10)
            stream.send("text")
            (last,) = stream.rest()
        assert last["line"] is None
        assert last["error"]["type"] == "unauthorized"


def test_a_client_that_closes_its_half_still_gets_its_answers(live: RunningService) -> None:
    """`curl -T -` and `nc` close nothing, but a body may be announced by its length."""
    lines = b'{"text": "free win"}\n' * 50
    answer = httpx.post(
        f"{live.url}/v1/predict/stream?adapter=a",
        content=lines,
        headers={"content-type": "application/x-ndjson"},
    )
    assert answer.status_code == 200
    assert len(answer.text.splitlines()) == 50


def test_a_broken_body_ends_the_stream_after_what_was_read(live: RunningService) -> None:
    with OpenStream(live.url) as stream:
        stream.send("text")
        assert "label" in stream.line()
        stream.socket.sendall(b"zz\r\n")
        (last,) = stream.rest()
    assert last["line"] is None
    assert last["error"]["type"] == "malformed_request"


def test_a_reset_connection_leaves_nothing_behind(live: RunningService) -> None:
    for _ in range(5):
        with OpenStream(live.url) as stream:
            stream.send(*texts(200))
            stream.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
    until(lambda: live.service.busy_jobs == 0)
    until(lambda: live.service.body_budget.bytes_in["memory"] == 0)
