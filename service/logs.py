"""Log lines: one event, one line. Knows nothing of what is logged.

The shape is `time level logger request=id message`; facts follow as `key=value`.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str] = ContextVar("request_id", default="-")


class LineFormatter(logging.Formatter):
    """Never more than one line: line breaks in messages are escaped, a traceback is one quoted
    field.

    Args:
        process: of several, which one logs.
    """

    def __init__(self, process: str | None) -> None:
        super().__init__()
        self._process = "" if process is None else f" process={process}"

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = (
            record.getMessage().replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        )
        line = (
            f"{time} {record.levelname.lower()} {record.name}{self._process} "
            f"request={request_id.get()} {message}"
        )
        if record.exc_info:
            line += f" exception={json.dumps(self.formatException(record.exc_info))}"
        return line


def configure_logging(level: str, *, process: str | None = None) -> None:
    """Send everything to stderr. uvicorn's own lines go the same way; its access log is ours."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        # "Started server process" and the like say nothing that our own lines do not.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
