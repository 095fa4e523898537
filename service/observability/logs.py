"""Log lines: one event, one line, as text or as JSON. Knows nothing of what is logged.

As text: `time level logger request=id message`. Facts stand in a message as `key=value`, written
`"adapter published name=%s", name`; JSON lines have them as fields of their own.
"""

import json
import logging
import re
from abc import abstractmethod
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
from opentelemetry import trace

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="-")

# A placeholder of printf, with the key that it is a fact of.
_PLACEHOLDER = re.compile(r"(?P<fact> ?(?P<key>[a-z_]+)=)?%[-#0 +]*\d*(?:\.\d+)?(?P<kind>[a-z%])")


class LineFormatter(logging.Formatter):
    """Never more than one line a record.

    Args:
        process: of several, which one logs.
    """

    def __init__(self, process: str | None) -> None:
        super().__init__()
        self._process = process

    @abstractmethod
    def format(self, record: logging.LogRecord) -> str: ...


class TextFormatter(LineFormatter):
    """Line breaks in messages are escaped, a traceback is one quoted field."""

    def format(self, record: logging.LogRecord) -> str:
        message = (
            record.getMessage().replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        )
        process = "" if self._process is None else f" process={self._process}"
        line = (
            f"{_time(record)} {record.levelname.lower()} {record.name}{process} "
            f"request={request_id.get()} {message}"
        )
        if record.exc_info:
            line += f" exception={json.dumps(self.formatException(record.exc_info))}"
        return line


class JsonFormatter(LineFormatter):
    """An object a line: time, level, logger, message, and what applies of process, request_id,
    trace_id and exception; then the message's facts."""

    def format(self, record: logging.LogRecord) -> str:
        message, facts = _parted(record)
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
        # A fact never takes the place of what every line has.
        return orjson.dumps(line | facts | line, default=str).decode()


def configure_logging(level: str, form: LogFormat, *, process: str | None = None) -> None:
    """Send everything to stderr. uvicorn's own lines go the same way; its access log is ours."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        # "Started server process" and the like say nothing that our own lines do not.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _parted(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """A record's message without its facts, and these."""
    if not isinstance(record.args, tuple) or not isinstance(record.msg, str):
        return _encodable(record.getMessage()), {}
    facts: dict[str, Any] = {}
    left: list[Any] = []
    values = iter(record.args)

    def taken(match: re.Match[str]) -> str:
        if match["kind"] == "%":
            return match[0]
        value = next(values)
        if match["key"] is None:
            left.append(value)
            return match[0]
        facts[match["key"]] = _encodable(value) if isinstance(value, str) else value
        return ""

    try:
        template = _PLACEHOLDER.sub(taken, record.msg)
        return _encodable(template % tuple(left)), facts
    except (StopIteration, TypeError, ValueError):
        # Somebody else's way of writing messages.
        return _encodable(record.getMessage()), {}


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
