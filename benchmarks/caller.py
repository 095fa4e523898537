"""A plain HTTP client that keeps its connection: what a benchmark asks a service one by one."""

import json
from dataclasses import dataclass
from http.client import HTTPConnection
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from benchmarks.report import BenchmarkFailed

_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Reply:
    """content: the parsed JSON."""

    status: int
    content: Any


class Caller:
    """One connection to one service; not for several threads."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._connection = HTTPConnection(parts.hostname, parts.port, timeout=_PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()

    def post(self, path: str, body: Any) -> Reply:
        return self._ask("POST", path, json.dumps(body).encode(), "application/json")

    def put(self, name: str, data: bytes) -> str:
        """Publish an adapter; the revision.

        Raises:
            BenchmarkFailed: it was refused.
        """
        reply = self._ask("PUT", f"/v1/adapters/{name}", data, "application/octet-stream")
        if reply.status not in (200, 201):
            raise BenchmarkFailed(f"publishing {name!r}: {reply.content}")
        return str(reply.content["revision"])

    def predict(self, adapter: str, text: str) -> dict[str, Any]:
        """The result for one text.

        Raises:
            BenchmarkFailed: there is none.
        """
        reply = self.post("/v1/predict", {"adapter": adapter, "inputs": text})
        if reply.status != 200:
            raise BenchmarkFailed(f"asking {adapter!r}: {reply.content}")
        (result,) = reply.content["results"]
        found: dict[str, Any] = result
        return found

    def _ask(self, method: str, path: str, body: bytes, kind: str) -> Reply:
        self._connection.request(method, path, body, {"Content-Type": kind})
        response = self._connection.getresponse()
        return Reply(response.status, json.loads(response.read()))
