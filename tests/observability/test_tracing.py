"""Traces: the caller's context continues, stages are spans, and nothing is sent by default."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.settings import InvalidSettings, read_settings
from tests.support.http_service import serve
from tests.support.service_process import ready_service
from tests.support.tiny_models import make_adapter, make_backbone, save_backbone

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """A real OTLP endpoint that keeps what it receives."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> Span:
        (span,) = (item for item in self.spans() if item.name == name)
        return span


@contextmanager
def collector() -> Iterator[Collector]:
    running = Collector()
    thread = threading.Thread(target=running.server.serve_forever)
    thread.start()
    try:
        yield running
    finally:
        running.server.shutdown()
        thread.join()
        running.server.server_close()


def attributes(span: Span) -> dict[str, str | int]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


@pytest.mark.slow
def test_a_request_is_a_span_under_its_callers_with_its_stages_below(tmp_path: Path) -> None:
    with collector() as received:
        with serve(tmp_path, OTLP_ENDPOINT=received.url) as live:
            live.put("a", make_adapter(make_backbone()))
            answer = live.client.post(
                "/v1/predict",
                json={"adapter": "a", "inputs": ["you", "the card"]},
                headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
            )
            assert answer.status_code == 200
            missing = live.client.post("/v1/predict", json={"adapter": "b", "inputs": "you"})
            assert missing.status_code == 404
        # The service has sent the rest while it stopped.
        mine = [span for span in received.spans() if span.trace_id.hex() == TRACE]
        request = next(span for span in mine if span.kind == Span.SPAN_KIND_SERVER)
        assert request.name == "POST /v1/predict"
        assert request.parent_span_id.hex() == PARENT
        assert attributes(request) == {
            "http.request.method": "POST",
            "url.path": "/v1/predict",
            "http.route": "/v1/predict",
            "http.response.status_code": 200,
            "idspam.texts": 2,
            "idspam.tokens": 7,
            "idspam.adapters": 1,
        }
        stages = sorted(
            (span for span in mine if span.parent_span_id == request.span_id),
            key=lambda span: span.start_time_unix_nano,
        )
        assert [span.name for span in stages] == ["tokenize", "queue", "inference"]
        assert all(
            span.end_time_unix_nano == after.start_time_unix_nano
            for span, after in pairwise(stages)
        )
        assert stages[-1].end_time_unix_nano <= request.end_time_unix_nano
        (failed,) = (
            span
            for span in received.spans()
            if attributes(span).get("error.type") == "adapter_not_found"
        )
        assert failed.status.code == 0
        resource = received.requests[0].resource_spans[0].resource
        names = {item.key: item.value.string_value for item in resource.attributes}
        assert names["service.name"] == "idspam"


@pytest.mark.slow
def test_workers_send_spans_and_json_lines_with_the_same_ids(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone")
    with collector() as received:
        with ready_service(
            folder,
            tmp_path,
            workers=1,
            OTLP_ENDPOINT=received.url,
            LOG_FORMAT="json",
            LOG_LEVEL="debug",
        ) as running:
            headers = {"x-request-id": "mine-1", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            httpx.get(f"{running.url}/v1/adapters", headers=headers)
        lines = [json.loads(line) for line in running.log.read_text().splitlines()]
        assert received.named("GET /v1/adapters").trace_id.hex() == TRACE
    assert {line.get("process") for line in lines} == {
        "supervisor",
        "engine",
        "standby",
        "worker-0",
    }
    (mine,) = (line for line in lines if line.get("request_id") == "mine-1")
    assert (mine["trace_id"], mine["path"], mine["status"]) == (TRACE, "/v1/adapters", 200)


def test_nothing_is_recorded_without_an_endpoint(tmp_path: Path) -> None:
    with serve(tmp_path) as live, live.service.tracing.request("GET", "/", {}) as span:
        assert not span.is_recording()


@pytest.mark.slow
def test_a_collector_that_is_not_there_delays_no_answer(tmp_path: Path) -> None:
    with serve(tmp_path, OTLP_ENDPOINT="http://127.0.0.1:9") as live:
        live.put("a", make_adapter(make_backbone()))
        assert live.predict(adapter="a", inputs="you")["results"]


@pytest.mark.parametrize("url", ["collector:4318", "http://", "ftp://x", "http:// x"])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(InvalidSettings, match="IDSPAM_OTLP_ENDPOINT"):
        read_settings({"IDSPAM_OTLP_ENDPOINT": url})


@pytest.mark.slow
def test_a_collector_on_this_machine_is_not_asked_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as received:
        with serve(tmp_path, OTLP_ENDPOINT=received.url) as live:
            # Read when spans are sent.
            monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
            monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
            assert live.client.get("/healthz").status_code == 200
        assert received.named("GET /healthz").end_time_unix_nano
