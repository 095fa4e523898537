"""Log lines: one event, one line, as text or as JSON.

A text line is `time level logger request=id message`. Facts are part of the message as `key=value`,
written `"adapter published name=%s", name`; in JSON they are fields of their own. Requests have a
line for people, `POST /v1/predict 200 2.3 ms texts=1 adapters=sms-spam`, with the same fields in
JSON.

What clients send may be part of a line, so characters that could end a line or move a terminal's
cursor are escaped, and a flood of warnings is cut to a few a second (`LineLimit`).
"""

import json
import logging
import re
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Literal

import orjson
from opentelemetry import trace

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="-")

# Warnings and errors of one place in the code, in each process.
LINES_PER_SECOND = 10

# The line of a request. Facts that are None are left out of the text.
REQUEST = (
    "request method=%s path=%s route=%s status=%d outcome=%s error=%s ms=%.2f texts=%s "
    "adapters=%s client=%s address=%s"
)

# A printf placeholder, with the key in front of it if it is a fact.
_PLACEHOLDER = re.compile(r"(?P<fact> ?(?P<key>[a-z_]+)=)?%[-#0 +]*\d*(?:\.\d+)?(?P<kind>[a-z%])")


class TextFormatter(logging.Formatter):
    """One line a record: control characters are escaped, and a traceback is one quoted field.

    Args:
        process: the name of this process, if the service has several.
    """

    def __init__(self, process: str | None) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        message = _escaped(_message(record))
        process = "" if self._process is None else f" process={self._process}"
        line = (
            f"{_time(record)} {record.levelname.lower()} {record.name}{process} "
            f"request={request_id.get()} {message}"
        )
        if record.exc_info:
            line += f" exception={json.dumps(self.formatException(record.exc_info))}"
        return line


class JsonFormatter(TextFormatter):
    """An object a line: time, level, logger, message; process, request_id, trace_id and exception
    where they apply; then the message's facts."""

    def format(self, record: logging.LogRecord) -> str:
        message, facts = _message_and_facts(record)
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if self._process is not None:
            line["process"] = self._process
        if (request := request_id.get()) != "-":
            line["request_id"] = request
        if (context := trace.get_current_span().get_span_context()).is_valid:
            line["trace_id"] = trace.format_trace_id(context.trace_id)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # A fact never replaces a field that every line has.
        text = orjson.dumps(line | facts | line, default=str).decode()
        # orjson writes DEL, C1 controls and bidirectional marks as they are.
        return text if text.isprintable() else _in_json(text)


@dataclass(slots=True)
class _Window:
    """The lines of one place in the code within one second. until: on `time.monotonic`."""

    until: float
    lines: int = 0


class LineLimit(logging.Filter):
    """Lets a place in the code log `LINES_PER_SECOND` warnings or errors a second, and counts the
    others: one line at the end of that second says how many they were.

    A request that is refused or broken costs its sender nothing, so its log line must not cost the
    service a disk. Lines below a warning pass: no refused request writes one.

    Args:
        handler: gets the line with the count.
    """

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler
        self._lock = threading.Lock()
        # By file and line: a message may hold text of clients, and would make endless kinds.
        self._windows: dict[tuple[str, int], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        place, now = (record.pathname, record.lineno), monotonic()
        with self._lock:
            window = self._windows.get(place)
            if window is None or now >= window.until:
                window = self._windows[place] = _Window(now + 1.0)
            window.lines += 1
            if window.lines == LINES_PER_SECOND + 1:
                timer = threading.Timer(window.until - now, self._report, (record, window))
                timer.daemon = True
                timer.start()
            return window.lines <= LINES_PER_SECOND

    def _report(self, record: logging.LogRecord, window: _Window) -> None:
        with self._lock:
            suppressed = window.lines - LINES_PER_SECOND
        line = logging.LogRecord(
            record.name,
            record.levelno,
            record.pathname,
            record.lineno,
            "further lines like this one were not logged suppressed=%d: %s",
            (suppressed, record.getMessage()),
            None,
        )
        # Not `handle`, which would ask this filter.
        self._handler.acquire()
        try:
            self._handler.emit(line)
        finally:
            self._handler.release()


def configure_logging(level: str, form: LogFormat, *, process: str | None = None) -> None:
    """Log everything to stderr, including uvicorn's lines; its access log is replaced by ours."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    handler.addFilter(LineLimit(handler))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        # "Started server process" and the like repeat what our own lines say.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def _message(record: logging.LogRecord) -> str:
    if record.msg != REQUEST or not isinstance(record.args, tuple):
        return record.getMessage()
    method, path, _, status, _, error, ms, *facts = record.args
    named = zip(("texts", "adapters", "client", "from"), facts, strict=True)
    shown = [f"{name}={value}" for name, value in (*named, ("error", error)) if value is not None]
    # 0: the client had gone before there was an answer.
    return " ".join([f"{method} {path} {status or 'gone'} {ms:.1f} ms", *shown])


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _message_and_facts(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """A record's message without its facts, and its facts."""
    if not isinstance(record.args, tuple) or not isinstance(record.msg, str):
        return _encodable(record.getMessage()), {}
    facts: dict[str, Any] = {}
    remaining: list[Any] = []
    values = iter(record.args)

    def take_fact(match: re.Match[str]) -> str:
        if match["kind"] == "%":
            return match[0]
        value = next(values)
        if match["key"] is None:
            remaining.append(value)
            return match[0]
        facts[match["key"]] = _encodable(value) if isinstance(value, str) else value
        return ""

    try:
        template = _PLACEHOLDER.sub(take_fact, record.msg)
        return _encodable(template % tuple(remaining)), facts
    except (StopIteration, TypeError, ValueError):
        # A library's message that is written in another way.
        return _encodable(record.getMessage()), {}


def _escaped(text: str) -> str:
    """Text without control characters, lone surrogates and bidirectional marks."""
    text = text.replace("\\", "\\\\")
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _in_json(text: str) -> str:
    """JSON with such characters as JSON's own escapes; it means the same."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
