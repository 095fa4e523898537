"""Log lines: one event, one line, as text or as JSON.

A text line is `time level logger request=id message`. Facts are part of the message as `key=value`,
written `"adapter published name=%s", name`; in JSON they are fields of their own.
"""

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
from opentelemetry import trace

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="-")

# A printf placeholder, with the key in front of it if it is a fact.
_PLACEHOLDER = re.compile(r"(?P<fact> ?(?P<key>[a-z_]+)=)?%[-#0 +]*\d*(?:\.\d+)?(?P<kind>[a-z%])")


class TextFormatter(logging.Formatter):
    """One line a record: line breaks are escaped, and a traceback is one quoted field.

    Args:
        process: the name of this process, if the service has several.
    """

    def __init__(self, process: str | None) -> None:
        super().__init__()
        self._process = process

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
        return orjson.dumps(line | facts | line, default=str).decode()


def configure_logging(level: str, form: LogFormat, *, process: str | None = None) -> None:
    """Log everything to stderr, including uvicorn's lines; its access log is replaced by ours."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        # "Started server process" and the like repeat what our own lines say.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


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


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
