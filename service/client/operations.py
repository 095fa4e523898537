"""What each method of the clients sends, and how its answer is read. Does no input or output.

Names and numbers that cannot be sent are refused here, before anything is.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from service.client.errors import InvalidCall, UnexpectedAnswer
from service.client.retrying import Call, Exchange, Exchanger, Reply, Request
from service.client.types import (
    AdapterDetail,
    AdapterFile,
    AdapterPage,
    AdapterSummary,
    Answer,
    Health,
    Input,
    Options,
    PredictBody,
    Published,
    RollbackBody,
    Text,
)

T = TypeVar("T")

PAGE = 1000
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REVISION = re.compile(r"[0-9a-f]{1,64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_JSON = {"content-type": "application/json"}


def predict(inputs: Text | Sequence[Text], adapter: str | None, options: Options) -> Call[Answer]:
    """One request of one input or several."""
    listed = [inputs] if isinstance(inputs, (str, Input)) else list(inputs)
    for index, item in enumerate(listed):
        if not isinstance(item, (str, Input)):
            raise InvalidCall(f"inputs.{index}: {type(item).__name__}, expected str or Input")
    body = PredictBody(
        inputs if isinstance(inputs, (str, Input)) else listed,
        adapter,
        top_k=options.get("top_k"),
        truncate=options.get("truncate"),
        explain=options.get("explain"),
        timeout_ms=options.get("timeout_ms"),
    )
    request = Request(
        "POST",
        "/v1/predict",
        headers=_JSON | _request_id(options.get("request_id")),
        body=_json(body),
        seconds=(body.timeout_ms or 0) / 1000,
    )

    def decode(reply: Reply) -> Answer:
        answer = msgspec.json.decode(reply.body, type=Answer)
        if len(answer) != len(listed):
            raise UnexpectedAnswer(f"{len(answer)} results for {len(listed)} inputs")
        return answer

    return Call(request, decode)


def adapters(exchanger: Exchanger) -> Exchange[list[AdapterSummary]]:
    """Every page of the list."""
    found: list[AdapterSummary] = []
    cursor: str | None = None
    while True:
        params = {"limit": str(PAGE)} | ({} if cursor is None else {"cursor": cursor})
        page = yield from exchanger(_get("/v1/adapters", AdapterPage, params))
        found += page.adapters
        following = page.next_cursor
        if following is None:
            return found
        if cursor is not None and following <= cursor:
            raise UnexpectedAnswer(f"{exchanger.url}: the list goes back from {cursor}")
        cursor = following


def show(name: str) -> Call[AdapterDetail]:
    return _get(_place(name), AdapterDetail)


def upload(
    name: str, file: bytes | Path | str, *, if_match: str | None, if_none_match: str | None
) -> Call[Published]:
    """
    Raises:
        OSError: the file cannot be read.
    """
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    conditions = _conditions(if_match, if_none_match)
    headers = {"content-type": "application/octet-stream"} | conditions

    def decode(reply: Reply) -> Published:
        made = msgspec.json.decode(reply.body, type=Published)
        if made.revision != hashlib.sha256(data).hexdigest():
            raise UnexpectedAnswer(f"published is revision {made.revision}, not this file's")
        return made

    # A revision is its content's hash: sent twice it is the same. But the second time a condition
    # would meet what the first left behind.
    request = Request("PUT", _place(name), headers=headers, body=data)
    return Call(request, decode, repeatable=not conditions)


def download(name: str, revision: str | None) -> Call[AdapterFile]:
    params = {} if revision is None else {"revision": _revision(revision)}

    def decode(reply: Reply) -> AdapterFile:
        found = hashlib.sha256(reply.body).hexdigest()
        if reply.headers.get("etag", "").strip('"') != found:
            raise UnexpectedAnswer(f"the file of adapter {name} did not arrive as it was sent")
        return AdapterFile(found, reply.body)

    return Call(Request("GET", f"{_place(name)}/file", params), decode)


def rollback(name: str, revision: str | None, *, if_match: str | None) -> Call[Published]:
    conditions = _conditions(if_match, None)
    request = Request(
        "POST",
        f"{_place(name)}/rollback",
        headers=_JSON | conditions,
        body=_json(RollbackBody(None if revision is None else _revision(revision))),
    )
    # "The previous one" is another one the second time.
    return Call(request, _reader(Published), repeatable=revision is not None and not conditions)


def delete(name: str, *, if_match: str | None) -> Call[None]:
    request = Request("DELETE", _place(name), headers=_conditions(if_match, None))
    # A second time it could meet what somebody has published since.
    return Call(request, lambda _: None, repeatable=False)


def health() -> Call[Health]:
    return Call(Request("GET", "/healthz"), _reader(Health), accepted=frozenset({503}))


def ready() -> Call[Health]:
    return Call(Request("GET", "/readyz"), _reader(Health), accepted=frozenset({503}))


def metrics() -> Call[str]:
    return Call(Request("GET", "/metrics"), lambda reply: reply.body.decode())


def _get(path: str, shape: type[T], params: Mapping[str, str] | None = None) -> Call[T]:
    return Call(Request("GET", path, params or {}), _reader(shape))


def _reader(shape: type[T]) -> Callable[[Reply], T]:
    return lambda reply: msgspec.json.decode(reply.body, type=shape)


def _place(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidCall(
            f"adapter name {name!r}: expected 1 to 64 of a-z 0-9 . _ -, a letter or digit first"
        )
    return f"/v1/adapters/{name}"


def _revision(revision: str) -> str:
    if not _REVISION.fullmatch(revision):
        raise InvalidCall(f"revision {revision!r}: expected the first of 64 of 0-9 a-f")
    return revision


def _conditions(if_match: str | None, if_none_match: str | None) -> dict[str, str]:
    given = {"if-match": if_match, "if-none-match": if_none_match}
    return {
        header: value if value == "*" else f'"{_revision(value)}"'
        for header, value in given.items()
        if value is not None
    }


def _request_id(value: str | None) -> dict[str, str]:
    if value is None:
        return {}
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidCall(f"request id {value!r}: expected 1 to 128 of A-Za-z0-9._:-")
    return {"x-request-id": value}


def _json(content: msgspec.Struct) -> bytes:
    try:
        return msgspec.json.encode(content)
    except (UnicodeEncodeError, msgspec.MsgspecError, TypeError) as error:
        raise InvalidCall(f"this is no JSON in UTF-8: {error}") from None
