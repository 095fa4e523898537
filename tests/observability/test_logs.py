"""Log lines: one event, one line, whose facts are fields."""

import io
import json
import logging
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from service.observability.logs import (
    LINES_PER_SECOND,
    JsonFormatter,
    LineLimit,
    TextFormatter,
    request_id,
)
from tests.support.http_service import until


def line(message: object, *args: Any, **attributes: Any) -> dict[str, Any]:
    """A record as a JSON line."""
    record = logging.LogRecord("service.x", logging.WARNING, "x.py", 1, message, args, None)
    vars(record).update(attributes)
    text = JsonFormatter(None).format(record)
    assert "\n" not in text
    return dict(json.loads(text))


def test_facts_are_fields_and_the_rest_is_the_message() -> None:
    fields = line("zoo adapter skipped file=%s size=%d: %s", "a.bin", 3, "no such head")
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "warning",
        "logger": "service.x",
        "message": "zoo adapter skipped: no such head",
        "file": "a.bin",
        "size": 3,
    }


@pytest.mark.parametrize(
    ("message", "args", "expected"),
    [
        ("100%% of %d", (3,), "100% of 3"),
        ("100%", (), "100%"),
        ("ratio=%.2f", (0.126,), ""),
        ("%(a)s", ({"a": 1},), "1"),
        ("a\nb %r", ("c\n",), "a\nb 'c\\n'"),
        ("lone %s", ("\udcff",), "lone ?"),
    ],
)
def test_any_message_is_one_line_of_json(
    message: str, args: tuple[Any, ...], expected: str
) -> None:
    assert line(message, *args)["message"] == expected


def test_a_fact_never_hides_what_every_line_has() -> None:
    fields = line("moved level=%s message=%s", "high", "hidden")
    assert (fields["level"], fields["message"]) == ("warning", "moved")


def test_the_request_and_the_trace_are_named() -> None:
    token = request_id.set("abc-1")
    tracer = TracerProvider().get_tracer("test")
    try:
        with tracer.start_as_current_span("x") as span:
            fields = line("done")
    finally:
        request_id.reset(token)
    assert fields["request_id"] == "abc-1"
    assert fields["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert {"request_id", "trace_id", "process"} & line("done").keys() == set()


def test_a_traceback_is_one_field() -> None:
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        fields = line("failed", exc_info=sys.exc_info())
    assert "ValueError: bad\nthing" in fields["exception"]


def test_text_lines_keep_facts_where_they_are() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter("worker-1"))
    record = logging.LogRecord("s", logging.INFO, "x", 1, "made name=%s\nx", ("a",), None)
    handler.emit(record)
    assert stream.getvalue().endswith(" info s process=worker-1 request=- made name=a\\nx\n")


def handler() -> tuple[logging.Logger, io.StringIO]:
    """A logger whose lines go through a line limit into a text."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter(None))
    handler.addFilter(LineLimit(handler))
    logger = logging.Logger("service.x", logging.INFO)
    logger.addHandler(handler)
    return logger, stream


@pytest.mark.slow
def test_a_flood_of_one_warning_is_cut_and_counted() -> None:
    logger, stream = handler()
    for index in range(500):
        logger.warning("refused path=%r", f"/{index}")
    logger.warning("another place is not affected")
    for _ in range(50):
        logger.info("a change")
    lines = stream.getvalue().splitlines()
    assert len([line for line in lines if "refused" in line]) == LINES_PER_SECOND
    assert len([line for line in lines if "another" in line]) == 1
    assert len([line for line in lines if "a change" in line]) == 50
    until(lambda: "suppressed" in stream.getvalue())
    (counted,) = [line for line in stream.getvalue().splitlines() if "suppressed" in line]
    assert f"suppressed={500 - LINES_PER_SECOND}: refused path=" in counted
    # The next second has its own lines.
    logger.warning("refused path=%r", "/later")
    for index in range(5):
        logger.warning("refused path=%r", f"/{index}")
    until(lambda: "/4" in stream.getvalue())


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2Jred", "\\x1b[2Jred"),
        ("\x00\x7f\x9b", "\\x00\\x7f\\x9b"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\u2028line", "\\u2028line"),
        ("lone \udcff", "lone \\udcff"),
        ("back\\slash", "back\\\\slash"),
        ("gr\u00fcn \u6f22", "gr\u00fcn \u6f22"),
    ],
)
def test_control_characters_cannot_forge_a_line_or_move_a_cursor(sent: str, shown: str) -> None:
    record = logging.LogRecord("service.x", logging.WARNING, "x.py", 1, "path %s", (sent,), None)
    text = TextFormatter(None).format(record)
    assert text.endswith(f"path {shown}")
    assert text.isprintable()
    as_json = JsonFormatter(None).format(record)
    assert as_json.isprintable()
    assert json.loads(as_json)["message"] == f"path {sent}".replace("\udcff", "?")
