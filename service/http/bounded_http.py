"""A connection whose every size and time is bounded.

uvicorn bounds neither the size of a head nor the time of anything but an idle connection. Its other
parser, h11, bounds the size of a head and nothing else, for 60 microseconds more of each request.
So this is a subclass of uvicorn's protocol over httptools. It parses what comes in small pieces,
counts them, and stops. Time is checked for all connections together, twice a second
(`service.http.connections`). All of it costs four microseconds a request.

    head        a URL, headers and their number are refused over their sizes with 414 or 431
    body        chunk sizes, extensions and trailers may take a fixed size beside the data
    pipeline    nothing more is parsed while a parsed request waits for its turn
    time        408 for a head that does not end and for a body that stalls or drips; a client
                that does not take its answer is disconnected
    closing     what the client is still sending is discarded for a while, so that it can read the
                answer: closing at once would reset the connection (nginx's lingering close)

A request whose body fails is answered by its route: `BODY_FAULT` in the state of its scope is the
error that reading the body raises. A route that answers while it reads sets `BODY_WATCHED` there,
and then keeps time itself.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from service.engine.observer import ConnectionEnd
from service.errors import BodyTimeout, EngineUnavailable, MalformedRequest, ServiceError
from service.http.bodies import BODY_FAULT, BODY_WATCHED
from service.http.connections import TOLD_CONNECTIONS, Connections
from service.http.plain_http import PlainHttpProtocol

MAX_URL_BYTES = 8 * 1024
MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
# What chunks and trailers may take beside twice the data.
MAX_FRAMING_BYTES = 32 * 1024
# What is parsed at once. It may hold a hundred small requests, which all become objects.
PIECE_BYTES = 2 * 1024
# What may wait unparsed behind a request in progress.
MAX_PIPELINED_BYTES = 1024 * 1024
# The unread rest of a body that is discarded so that the connection can be used again.
MAX_SKIPPED_BYTES = 256 * 1024

# How long and for how much a refused client may go on sending.
LINGER_SECONDS = 10.0
LINGER_IDLE_SECONDS = 2.0
LINGER_HEAD_BYTES = 1024 * 1024
LINGER_BODY_BYTES = 64 * 1024 * 1024

Part = Literal["none", "head", "body"]


@dataclass(frozen=True, slots=True)
class EarlyAnswer:
    """An answer to what is not yet a request. It has no path, so its shape is our own routes'."""

    status: int
    type: str
    message: str
    reason: ConnectionEnd

    def text(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The whole response. headers: those of every response."""
        error = {"type": self.type, "message": self.message, "details": []}
        body = orjson.dumps({"error": error})
        headers = [
            *headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.status == 503:
            headers.append((b"retry-after", b"2"))
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        return STATUS_LINE[self.status] + lines + b"\r\n" + body


LONG_URL = EarlyAnswer(414, "uri_too_long", f"the URL is over {MAX_URL_BYTES} bytes", "url")
LARGE_HEAD = EarlyAnswer(
    431,
    "headers_too_large",
    f"the request line and headers are over {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} headers",
    "headers",
)
MALFORMED = EarlyAnswer(400, "malformed_request", "this is not valid HTTP/1.1", "malformed")
UNKNOWN_CODING = EarlyAnswer(
    501,
    "not_implemented",
    "the only Transfer-Encoding is chunked, and there is none in HTTP/1.0",
    "malformed",
)
SLOW_HEAD = EarlyAnswer(408, "request_timeout", "the headers took too long", "slow_head")
TOO_MANY = EarlyAnswer(503, "unavailable", "too many connections", "too_many")


_NO_PERIOD = ("", 0.0, 0)

# A larger body is sent on its own, without a copy.
_JOINED_BYTES = 64 * 1024


class _Refused(Exception):
    """Ends the parser, whose callbacks cannot do it in another way."""

    def __init__(self, answer: EarlyAnswer) -> None:
        self.answer = answer
        super().__init__(answer.message)


class _Transport:
    """A connection's transport with another way to close it, and a count of what was written.

    It sends the head of an answer together with the beginning of its body: uvicorn writes them one
    after the other, and each write is a system call. It has the methods of `asyncio.Transport`
    that uvicorn calls.

    Args:
        close: called instead of the transport's.
        call_soon: of the event loop.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        close: Callable[[], None],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self.raw = transport
        self._head = b""
        self._call_soon = call_soon
        self.written = 0
        self.closing = False
        self._close = close
        self._write = transport.write
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_extra_info = transport.get_extra_info
        self.waiting_bytes = transport.get_write_buffer_size

    def write(self, data: bytes) -> None:
        self.written += len(data)
        if self._head:
            if len(data) > _JOINED_BYTES:
                self._send_head()
            else:
                data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/"):
            self._head = data
            # No body may follow, or none soon.
            self._call_soon(self._send_head)
            return
        self._write(data)

    def _send_head(self) -> None:
        if self._head:
            data, self._head = self._head, b""
            self._write(data)

    def is_closing(self) -> bool:
        return self.closing or self.raw.is_closing()

    def close(self) -> None:
        if not self.closing:
            self._send_head()
            self.closing = True
            self._close()


class BoundedHttpProtocol(PlainHttpProtocol):
    """One connection.

    Args:
        connections: all of this process.
        uvicorn: what uvicorn passes.
    """

    transport: _Transport  # type: ignore[assignment]

    def __init__(self, connections: Connections, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._all = connections
        # Which part of a request comes next; and of that request:
        self._part: Part = "none"
        self._head_bytes = 0
        self._announced = 0
        self._chunked = False
        self._keeps_alive = False
        self._framing_bytes = 0
        # Data of all bodies so far, and what it will be at the end of an announced one.
        self._data_bytes = 0
        self._data_end = 0
        # What came behind a request that still waits for its turn.
        self._unparsed = b""
        # Since when a head is awaited or received.
        self._since = self.loop.time()
        # A period of a body or of an answer: which, since when, and what had been moved then.
        self._period: tuple[str, float, int] = _NO_PERIOD
        self._received = 0
        # Once it is known that the connection ends, input is discarded up to a limit.
        self._deaf = False
        self._last_answer: EarlyAnswer | None = None
        self._discards = LINGER_HEAD_BYTES
        self._lingers_until = 0.0
        self._last_input = 0.0

    # Called by the event loop.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self._close, self.loop.call_soon))  # type: ignore[arg-type]
        number = len(self.connections)
        if self._all.has_room(self, number):
            return
        self._all.ended("too_many")
        if number > self._all.limits.connections + TOLD_CONNECTIONS:
            self._abort()
        else:
            self._say(TOO_MANY)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unparsed = b""
        self.transport.closing = True
        super().connection_lost(exc)
        self._all.left(self, len(self.connections))
        if self._is_answering() and (left := self._state.get(BODY_WATCHED)) is not None:
            left()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._deaf:
            self._discard(len(data))
        elif self._unparsed or self.pipeline:
            self._keep_unparsed(data)
        else:
            self._unset_keepalive_if_required()
            self._parse(memoryview(data))

    # Called by the parser. An exception ends it.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part = "head"
        self._since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        if len(self.url) + len(url) > MAX_URL_BYTES:
            raise _Refused(LONG_URL)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._part == "body":
            # A trailer. uvicorn would add it to the headers, which have been checked before.
            return
        if len(self.headers) >= MAX_HEADERS:
            raise _Refused(LARGE_HEAD)
        super().on_header(name, value)

    def head_complete(self) -> None:
        self._head_bytes = self._announced = self._framing_bytes = 0
        self._chunked = False
        for name, value in self.headers:
            if name == b"content-length":
                # The parser accepts nothing but digits and spaces.
                self._announced = int(value)
            elif name == b"transfer-encoding":
                if value.lower() != b"chunked" or self.parser.get_http_version() != "1.1":
                    raise _Refused(UNKNOWN_CODING)
                self._chunked = True
        super().head_complete()
        self._part = "body"
        self._period = _NO_PERIOD
        self._data_end = self._data_bytes + self._announced
        self._all.waiting.pop(self, None)
        if self._all.draining:
            self._all.last_request = self.loop.time()
            # uvicorn then answers with `Connection: close`.
            self.cycle.keep_alive = False
        if self._is_long():
            # If the answer comes before the end of the body, the rest is not worth reading.
            self._keeps_alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_body(self, body: bytes) -> None:
        self._data_bytes += len(body)
        super().on_body(body)

    def message_complete(self) -> None:
        super().message_complete()
        if self._is_long() and not self.cycle.response_started and not self._all.draining:
            self.cycle.keep_alive = self._keeps_alive
        self._part = "none"

    # Called by uvicorn.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since = self.loop.time()
        if self.transport.is_closing():
            return
        if self.pipeline:
            self.flow.pause_reading()
            return
        if self.cycle.response_complete:
            if self._last_answer is not None:
                self._say(self._last_answer)
            elif self._deaf:
                self.transport.close()
            else:
                self._all.waiting[self] = None
        if self._unparsed:
            data, self._unparsed = self._unparsed, b""
            self._unset_keepalive_if_required()
            self._parse(memoryview(data))

    def shutdown(self) -> None:
        if self._lingers_until:
            self._abort()
        else:
            super().shutdown()

    # Called by `Connections`.

    def check(self, now: float) -> None:
        limits = self._all.limits
        unsent = self.transport.waiting_bytes()
        if not unsent and self._period[0] == "answer":
            # The client has all of that answer. The next one has a period of its own.
            self._period = _NO_PERIOD
        if unsent:
            self._check_period("answer", now, self.transport.written - unsent)
        elif self._lingers_until:
            idle = now - max(self._last_input, self._since)
            patience = min(LINGER_IDLE_SECONDS, limits.head_seconds)
            if now > self._lingers_until or idle > patience:
                self._abort()
            elif self.flow.read_paused:
                self._last_input = now
                self.flow.resume_reading()
        elif self.transport.is_closing():
            return
        elif self._part == "body" and not self._deaf:
            if BODY_WATCHED in self._state:
                self._period = _NO_PERIOD
                return
            if self._all.draining and now > self._all.bodies_until:
                self._fail_body(EngineUnavailable("the service is draining"), "draining")
                return
            # A client is not to blame while its body is not read.
            reading = not self.flow.read_paused
            self._check_period("body" if reading else "", now, self._received)
        elif self._is_answering():
            self._period = _NO_PERIOD
        elif self._part == "none" and self.timeout_keep_alive_task is not None:
            return
        elif now - self._since > limits.head_seconds:
            self._all.ended("slow_head")
            if self._part == "head":
                self._say(SLOW_HEAD)
            else:
                self.transport.close()

    def evict(self) -> None:
        self._all.waiting.pop(self, None)
        self._abort()

    def drain(self) -> None:
        # An idle connection stays for a moment: its client may be sending, and would be reset.
        if self._is_answering():
            self.cycle.keep_alive = False

    # Input.

    def _parse(self, rest: memoryview) -> None:
        try:
            while rest:
                piece, rest = self._next_piece(rest)
                before = self._data_bytes
                self.parse(piece)
                if self._chunked and self._part == "body":
                    self._count_framing(len(piece), self._data_bytes - before)
                if self._deaf:
                    return
                if self.pipeline and rest:
                    self._keep_unparsed(bytes(rest))
                    return
        except (httptools.HttpParserError, _Refused) as error:
            cause = error if isinstance(error, _Refused) else error.__context__
            self._refuse(cause.answer if isinstance(cause, _Refused) else MALFORMED)

    def _next_piece(self, rest: memoryview) -> tuple[memoryview, memoryview]:
        """Split what has come.

        Raises:
            _Refused: the head is too large.
        """
        if self._part == "body":
            size = max(PIECE_BYTES, self._data_end - self._data_bytes)
        else:
            size = min(PIECE_BYTES, MAX_HEAD_BYTES - self._head_bytes)
            if size == 0:
                raise _Refused(LARGE_HEAD)
            # More than has come of the head if the piece ends in the body; then this starts anew.
            self._head_bytes += min(size, len(rest))
        return (rest, rest[:0]) if len(rest) <= size else (rest[:size], rest[size:])

    def _count_framing(self, fed: int, data: int) -> None:
        """As in Go's server: only bytes beyond a multiple of the data count.

        Raises:
            _Refused: they are too many.
        """
        self._framing_bytes = max(0, self._framing_bytes + fed - 3 * data)
        if self._framing_bytes > MAX_FRAMING_BYTES:
            raise _Refused(MALFORMED)

    def _keep_unparsed(self, data: bytes) -> None:
        self._unparsed += data
        # Reading a body resumes it, for a packet.
        self.flow.pause_reading()
        if len(self._unparsed) > MAX_PIPELINED_BYTES:
            self._all.ended("malformed")
            self._abort()

    def _discard(self, size: int) -> None:
        self._last_input = self.loop.time()
        self._discards -= size
        self._all.discards -= size
        if self._discards < 0:
            self._abort()
        elif self._all.discards < 0:
            # Until the next check: refused clients must not keep this process busy.
            self.flow.pause_reading()

    def _is_answering(self) -> bool:
        # None before the first request, unlike uvicorn's annotation says.
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is not None and not cycle.response_complete

    @property
    def _state(self) -> dict[str, Any]:
        """What the present request's scope and all copies of it share."""
        return self.cycle.scope["state"]

    def _is_long(self) -> bool:
        return self._chunked or self._announced > MAX_SKIPPED_BYTES

    # The end.

    def _refuse(self, answer: EarlyAnswer) -> None:
        if self._part == "body" and answer is MALFORMED:
            self._fail_body(MalformedRequest("the body is not valid HTTP/1.1"), "malformed")
            return
        self._all.ended(answer.reason)
        self._deaf = True
        if self._is_answering():
            # Requests before this one are answered first.
            self._last_answer = answer
            self.flow.pause_reading()
        else:
            self._say(answer)

    def _fail_body(self, error: ServiceError, reason: ConnectionEnd) -> None:
        self._all.ended(reason)
        self._deaf = True
        if self.cycle.response_complete:
            self.transport.close()
            return
        self._state[BODY_FAULT] = error
        self.cycle.keep_alive = False
        self.cycle.message_event.set()

    def _say(self, answer: EarlyAnswer) -> None:
        self._part = "head"
        self.transport.write(answer.text(self.server_state.default_headers))
        self.transport.close()

    def _close(self) -> None:
        """Close the connection; first let the client read its answer if it may be sending."""
        self._deaf = True
        self._unset_keepalive_if_required()
        self._unparsed = b""
        if self._part == "none" and not self.flow.read_paused:
            self.transport.raw.close()
            return
        if self._part == "body":
            self.cycle.body = bytearray()
            if BODY_FAULT not in self._state:
                # A good body that is not wanted, unlike one that is broken or stalls.
                self._discards = LINGER_BODY_BYTES
        self._since = self.loop.time()
        self._lingers_until = self._since + LINGER_SECONDS
        self._all.waiting[self] = None
        if self.transport.raw.can_write_eof():
            self.transport.raw.write_eof()
        self.flow.resume_reading()

    def _abort(self) -> None:
        self.transport.closing = self._deaf = True
        self.transport.raw.abort()

    def _check_period(self, what: str, now: float, moved: int) -> None:
        """End the connection if too little was moved in the last period."""
        limits = self._all.limits
        before, since, moved_before = self._period
        seconds = limits.stall_seconds
        if what != before:
            self._period = (what, now, moved)
        elif what and now - since > seconds:
            if moved - moved_before >= seconds * limits.bytes_per_second:
                self._period = (what, now, moved)
            elif what == "answer":
                self._all.ended("slow_reader")
                self._abort()
            else:
                pace = f"{limits.bytes_per_second} bytes a second over {seconds:g} s"
                self._fail_body(BodyTimeout(f"the body came slower than {pace}"), "slow_body")
