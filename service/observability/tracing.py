"""OpenTelemetry traces: a span for each request, under its caller's span, and one for each stage.

Off unless an endpoint is set. The standard `OTEL_*` variables set everything else:
`OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`, `OTEL_RESOURCE_ATTRIBUTES`, ...
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from opentelemetry import propagate, trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanKind, StatusCode, Tracer

from adapters import __version__

SERVICE_NAME = "idspam"
_SILENT = NonRecordingSpan(trace.INVALID_SPAN_CONTEXT)


class Tracing:
    """Spans of one process, sent in the background by OTLP over HTTP.

    Args:
        endpoint: of the collector, `http://host:4318`; None disables tracing.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._tracer: Tracer | None = None
        if endpoint is None:
            return
        # Importing these takes 0.1 s: only with tracing.
        import requests
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from service.client.proxies import is_loopback

        defaults = {"service.name": SERVICE_NAME, "service.version": __version__}
        resource = Resource.create(defaults).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        session = requests.Session()
        # A proxy of the environment cannot reach a collector on this machine.
        session.trust_env = not is_loopback(urlsplit(endpoint).hostname or "")
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", session=session)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("idspam", __version__)

    @property
    def is_on(self) -> bool:
        """Whether spans are sent; what they would say need not be worked out otherwise."""
        return self._tracer is not None

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """The span of a request, current while it is answered; its parent is the caller's span."""
        if self._tracer is None:
            yield _SILENT
            return
        attributes = {"http.request.method": method, "url.path": path}
        with self._tracer.start_as_current_span(
            method,
            propagate.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,
        ) as span:
            yield span

    def classified(self, *, tokenize: float, queue: float, inference: float, **facts: int) -> None:
        """Record the stages of the current request, from how long they took.

        Queue and inference are those of the slowest text. The stages follow each other and end now.
        """
        span = trace.get_current_span()
        if self._tracer is None or not span.is_recording():
            return
        span.set_attributes({f"idspam.{name}": value for name, value in facts.items()})
        ends = time.time_ns()
        for name, seconds in (("inference", inference), ("queue", queue), ("tokenize", tokenize)):
            begins = ends - round(seconds * 1e9)
            self._tracer.start_span(name, start_time=begins).end(ends)
            ends = begins

    def close(self) -> None:
        """Send what is left; takes seconds if the collector does not answer."""
        if self._tracer is not None:
            self._provider.shutdown()
            self._tracer = None


def answered(span: Span, *, method: str, route: str, status: int, error: str | None) -> None:
    """Record how a request was answered."""
    if not span.is_recording():
        return
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status})
    if error is not None:
        span.set_attribute("error.type", error)
    if status >= 500:
        span.set_status(StatusCode.ERROR)
