"""What each method of the clients sends, and how its answer is read.

Names and numbers that the service cannot accept are refused here, before anything is sent.
"""

import base64
import hashlib
import re
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from service.client.batch import answers_of
from service.client.errors import InvalidCall, UnexpectedAnswer
from service.client.retry import Call, Exchange, Exchanger, Reply, Request
from service.client.types import (
    AdapterDetail,
    AdapterFile,
    AdapterPage,
    AdapterState,
    AdapterSummary,
    Answer,
    Card,
    Drift,
    Embeddings,
    Health,
    Input,
    Options,
    Published,
    Ranked,
    Ranking,
    Result,
    RevisionDifference,
    Rule,
    Text,
    TrafficDetail,
    Unanswered,
    UncertainText,
    UncertainTexts,
    UploadReport,
    Wait,
)

T = TypeVar("T")

PAGE = 1000
WAITS: tuple[str, ...] = get_args(Wait)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REVISION = re.compile(r"[0-9a-f]{1,64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_REQUEST_KEY = re.compile(r"[!-~]{1,256}")
_JSON = {"content-type": "application/json"}


def predict(
    inputs: Text | Sequence[Text],
    adapter: str | None,
    options: Options,
    adapters: Sequence[str] | None = None,
) -> Call[Answer]:
    """One request with one input or several. adapters: several in place of one, for each input."""
    texts = [inputs] if isinstance(inputs, (str, Input)) else list(inputs)
    for index, text in enumerate(texts):
        if not isinstance(text, (str, Input)):
            raise InvalidCall(f"inputs.{index}: {type(text).__name__}, expected str or Input")
    each = 1 if adapters is None else len(adapters)
    expected = sum(answers_of(text, each) for text in texts)
    sent = inputs if isinstance(inputs, (str, Input)) else texts
    body: dict[str, Any] = {"inputs": sent, "adapter": adapter, "adapters": adapters, **options}
    headers = _JSON | _request_id(body.pop("request_id", None))
    headers |= _request_key(body.pop("request_key", None))
    # Options that are None are left to the service.
    content = _json({key: value for key, value in body.items() if value is not None})
    seconds = (options.get("timeout_ms") or 0) / 1000
    request = Request("POST", "/v1/predict", headers=headers, body=content, seconds=seconds)

    def decode(reply: Reply) -> Answer:
        answer = msgspec.json.decode(reply.body, type=Answer)
        if len(answer) != expected:
            raise UnexpectedAnswer(f"{len(answer)} results for {len(texts)} inputs")
        return answer

    return Call(request, decode)


def stream_line(text: Text) -> bytes:
    """An input as a line of a stream, without its end."""
    if not isinstance(text, (str, Input)):
        raise InvalidCall(f"{type(text).__name__} among the inputs, expected str or Input")
    return _encoded(text)


def stream_params(adapter: str | None, options: Options) -> tuple[dict[str, str], dict[str, str]]:
    """The query and the headers of a stream."""
    values: dict[str, Any] = {"adapter": adapter, **options}
    headers = _request_id(values.pop("request_id", None))
    headers |= _request_key(values.pop("request_key", None))
    return {name: _in_url(value) for name, value in values.items() if value is not None}, headers


def stream_answer(line: bytes) -> Result | Unanswered:
    """
    Raises:
        UnexpectedAnswer: this is neither.
    """
    try:
        return msgspec.json.decode(line, type=Result)
    except msgspec.MsgspecError:
        pass
    try:
        return msgspec.json.decode(line, type=Unanswered)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UnexpectedAnswer(f"a line that is not an answer of this service: {error}") from None


def _in_url(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int


class _RankedDocument(msgspec.Struct, frozen=True):
    index: int
    relevance_score: float


class _RerankAnswer(msgspec.Struct, frozen=True):
    results: tuple[_RankedDocument, ...]
    usage: _Usage


def rerank(
    query: str,
    documents: Sequence[str],
    adapter: str | None,
    *,
    label: str | None,
    top_n: int | None,
    truncate: bool,
    request_id: str | None,
    request_key: str | None,
) -> Call[Ranking]:
    """By the route of vLLM, Jina and Cohere; errors have its shape."""
    texts = _texts(documents, "documents")
    body: dict[str, Any] = {
        "model": adapter,
        "query": query,
        "documents": texts,
        "top_n": top_n or 0,
        "return_documents": False,
        "label": label,
    } | _cut(truncate)
    headers = _JSON | _request_id(request_id) | _request_key(request_key)
    request = Request("POST", "/v1/rerank", headers=headers, body=_json(body))
    expected = min(top_n or len(texts), len(texts))

    def decode(reply: Reply) -> Ranking:
        answer = msgspec.json.decode(reply.body, type=_RerankAnswer)
        if len(answer.results) != expected:
            raise UnexpectedAnswer(f"{len(answer.results)} results for {len(texts)} documents")
        results = [Ranked(item.index, item.relevance_score) for item in answer.results]
        return Ranking(tuple(results), answer.usage.prompt_tokens)

    return Call(request, decode)


class _Vector(msgspec.Struct, frozen=True):
    embedding: str


class _EmbeddingsAnswer(msgspec.Struct, frozen=True):
    data: tuple[_Vector, ...]
    model: str
    usage: _Usage


def embed(
    inputs: str | Sequence[str],
    *,
    dimensions: int | None,
    truncate: bool,
    request_id: str | None,
) -> Call[Embeddings]:
    """By OpenAI's route; errors have vLLM's shape."""
    texts = [inputs] if isinstance(inputs, str) else _texts(inputs, "inputs")
    body = {"input": texts, "encoding_format": "base64", "dimensions": dimensions}
    headers = _JSON | _request_id(request_id)
    content = _json(body | _cut(truncate))
    request = Request("POST", "/v1/embeddings", headers=headers, body=content)

    def decode(reply: Reply) -> Embeddings:
        answer = msgspec.json.decode(reply.body, type=_EmbeddingsAnswer)
        if len(answer.data) != len(texts):
            raise UnexpectedAnswer(f"{len(answer.data)} vectors for {len(texts)} texts")
        vectors = tuple(_floats(item.embedding) for item in answer.data)
        return Embeddings(vectors, answer.model, answer.usage.prompt_tokens)

    return Call(request, decode)


def _texts(texts: Sequence[str], place: str) -> list[str]:
    """
    Raises:
        InvalidCall: one text, which is a sequence of texts to Python, or something else.
    """
    if isinstance(texts, str):
        raise InvalidCall(f"{place}: one text; expected a list of them")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidCall(f"{place}.{index}: {type(text).__name__}, expected str")
    return list(texts)


def _cut(truncate: bool) -> dict[str, int]:
    return {"truncate_prompt_tokens": -1} if truncate else {}


def _floats(encoded: str) -> tuple[float, ...]:
    """A vector of little-endian float32 in base 64."""
    values = array("f")
    try:
        values.frombytes(base64.b64decode(encoded, validate=True))
    except ValueError as error:
        raise UnexpectedAnswer(f"a vector that is not base 64 of float32: {error}") from None
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(values)


def adapters(
    exchanger: Exchanger, search: str = "", state: AdapterState | None = None
) -> Exchange[list[AdapterSummary]]:
    """All pages of the list."""
    adapters: list[AdapterSummary] = []
    cursor: str | None = None
    chosen = ({"search": search} if search else {}) | ({"state": state} if state else {})
    while True:
        params = chosen | {"limit": str(PAGE)} | ({} if cursor is None else {"cursor": cursor})
        page = yield from exchanger(_get("/v1/adapters", AdapterPage, params))
        adapters += page.adapters
        if page.next_cursor is None:
            return adapters
        if cursor is not None and page.next_cursor <= cursor:
            raise UnexpectedAnswer(f"{exchanger.url}: the list goes back from {cursor}")
        cursor = page.next_cursor


def show(name: str) -> Call[AdapterDetail]:
    return _get(_path(name), AdapterDetail)


def upload(
    name: str,
    file: bytes | Path | str,
    *,
    if_match: str | None,
    if_none_match: str | None,
    force: bool = False,
    stage: bool = False,
    wait: Wait | None = None,
) -> Call[Published]:
    """
    Raises:
        OSError: the file cannot be read.
    """
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    conditions = _conditions(if_match, if_none_match)
    headers = {"content-type": "application/octet-stream"} | conditions

    def decode(reply: Reply) -> Published:
        published = msgspec.json.decode(reply.body, type=Published)
        if published.revision != hashlib.sha256(data).hexdigest():
            raise UnexpectedAnswer(
                f"the service published revision {published.revision}, not this file's"
            )
        return published

    # A revision is the hash of its content, so a second upload changes nothing. With a condition it
    # would fail: the first upload has changed what the condition is about.
    params = ({"force": "true"} if force else {}) | ({"stage": "true"} if stage else {})
    params |= _wait(wait)
    request = Request("PUT", _path(name), params, headers=headers, body=data)
    return Call(request, decode, repeatable=not conditions)


def check(
    name: str,
    file: bytes | Path | str,
    *,
    if_match: str | None,
    if_none_match: str | None,
    force: bool = False,
    stage: bool = False,
) -> Call[UploadReport]:
    """
    Raises:
        OSError: the file cannot be read.
    """
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    headers = {"content-type": "application/octet-stream"}
    headers |= _conditions(if_match, if_none_match)
    params = {"dry_run": "true"} | ({"force": "true"} if force else {})
    params |= {"stage": "true"} if stage else {}
    request = Request("PUT", _path(name), params, headers=headers, body=data)
    return Call(request, _decoder(UploadReport))


def difference(name: str, before: str | None, after: str | None) -> Call[RevisionDifference]:
    sides = {"before": before, "after": after}
    params = {side: _revision(value) for side, value in sides.items() if value is not None}
    return _get(f"{_path(name)}/difference", RevisionDifference, params)


def card(name: str, revision: str | None) -> Call[Card]:
    params = {} if revision is None else {"revision": _revision(revision)}

    def decode(reply: Reply) -> Card:
        return Card(_revision_of(reply), reply.body.decode())

    return Call(Request("GET", f"{_path(name)}/card", params), decode)


def set_card(name: str, text: str, revision: str | None, *, if_match: str | None) -> Call[str]:
    params = {} if revision is None else {"revision": _revision(revision)}
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise InvalidCall(f"the card cannot be sent as UTF-8: {error}") from None
    headers = {"content-type": "text/markdown; charset=utf-8"} | _conditions(if_match, None)
    request = Request("PUT", f"{_path(name)}/card", params, headers=headers, body=content)
    # The condition is about the current revision, which this does not change.
    return Call(request, _revision_of)


def _revision_of(reply: Reply) -> str:
    """The revision that an answer is about."""
    revision = reply.headers.get("etag", "").removeprefix("W/").strip('"')
    if not _REVISION.fullmatch(revision):
        raise UnexpectedAnswer("an answer that names no revision")
    return revision


def unload(name: str) -> Call[None]:
    """By the route of the Open Inference Protocol; errors are one sentence."""
    return Call(Request("POST", f"{_repository(name)}/unload"), lambda _: None)


def load(name: str) -> Call[None]:
    """As `unload`."""
    return Call(Request("POST", f"{_repository(name)}/load"), lambda _: None)


def download(name: str, revision: str | None) -> Call[AdapterFile]:
    params = {} if revision is None else {"revision": _revision(revision)}

    def decode(reply: Reply) -> AdapterFile:
        sha256 = hashlib.sha256(reply.body).hexdigest()
        if reply.headers.get("etag", "").strip('"') != sha256:
            raise UnexpectedAnswer(f"the file of adapter {name} did not arrive as it was sent")
        return AdapterFile(sha256, reply.body)

    return Call(Request("GET", f"{_path(name)}/file", params), decode)


def rollback(
    name: str, revision: str | None, *, if_match: str | None, wait: Wait | None = None
) -> Call[Published]:
    conditions = _conditions(if_match, None)
    request = Request(
        "POST",
        f"{_path(name)}/rollback",
        _wait(wait),
        headers=_JSON | conditions,
        body=_json({"revision": None if revision is None else _revision(revision)}),
    )
    # The second time, "the previous revision" is another one.
    return Call(request, _decoder(Published), repeatable=revision is not None and not conditions)


def delete(name: str, *, if_match: str | None, wait: Wait | None = None) -> Call[None]:
    request = Request("DELETE", _path(name), _wait(wait), headers=_conditions(if_match, None))
    # A second request could delete what someone has published since.
    return Call(request, lambda _: None, repeatable=False)


def delete_revision(
    name: str, revision: str, *, if_match: str | None, wait: Wait | None = None
) -> Call[None]:
    path = f"{_path(name)}/revisions/{_revision(revision)}"
    request = Request("DELETE", path, _wait(wait), headers=_conditions(if_match, None))
    return Call(request, lambda _: None, repeatable=False)


def set_traffic(
    name: str,
    revision: str,
    percent: float,
    *,
    shadow: bool,
    rule: Rule | None,
    if_match: str | None,
    wait: Wait | None = None,
) -> Call[TrafficDetail]:
    conditions = _conditions(if_match, None)
    body = {
        "revision": _revision(revision),
        "percent": percent,
        "shadow": shadow,
        "rule": rule,
    }
    headers = _JSON | conditions
    request = Request("PUT", _traffic(name), _wait(wait), headers=headers, body=_json(body))
    # The condition is about the current revision, which this does not change.
    return Call(request, _decoder(TrafficDetail))


def traffic(name: str) -> Call[TrafficDetail]:
    return _get(_traffic(name), TrafficDetail)


def end_traffic(name: str, *, if_match: str | None, wait: Wait | None = None) -> Call[None]:
    request = Request("DELETE", _traffic(name), _wait(wait), headers=_conditions(if_match, None))
    # A second request could end what someone has begun since.
    return Call(request, lambda _: None, repeatable=False)


def promote(name: str, *, if_match: str | None, wait: Wait | None = None) -> Call[Published]:
    path = f"{_traffic(name)}/promote"
    request = Request("POST", path, _wait(wait), headers=_conditions(if_match, None))
    return Call(request, _decoder(Published), repeatable=False)


def drift(name: str, revision: str | None) -> Call[Drift]:
    params = {} if revision is None else {"revision": _revision(revision)}
    return _get(f"{_path(name)}/drift", Drift, params)


def uncertain(name: str) -> Call[tuple[UncertainText, ...]]:
    request = Request("GET", f"{_path(name)}/uncertain")
    return Call(request, lambda reply: msgspec.json.decode(reply.body, type=UncertainTexts).texts)


def uncertain_file(name: str, format: Literal["jsonl", "csv"]) -> Call[bytes]:
    request = Request("GET", f"{_path(name)}/uncertain", {"format": format})
    return Call(request, lambda reply: reply.body)


def forget_uncertain(name: str) -> Call[None]:
    return Call(Request("DELETE", f"{_path(name)}/uncertain"), lambda _: None)


def probe(path: str) -> Call[Health]:
    return Call(Request("GET", path), _decoder(Health), accepted=frozenset({503}))


def metrics(names: Sequence[str]) -> Call[str]:
    params = {"name[]": _texts(names, "names")} if names else {}
    return Call(Request("GET", "/metrics", params), lambda reply: reply.body.decode())


def _get(path: str, shape: type[T], params: Mapping[str, str] | None = None) -> Call[T]:
    return Call(Request("GET", path, params or {}), _decoder(shape))


def _decoder(shape: type[T]) -> Callable[[Reply], T]:
    return lambda reply: msgspec.json.decode(reply.body, type=shape)


def _path(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidCall(
            f"adapter name {name!r}: expected 1 to 64 of a-z 0-9 . _ -, a letter or digit first"
        )
    return f"/v1/adapters/{name}"


def _repository(name: str) -> str:
    _path(name)
    return f"/v2/repository/models/{name}"


def _traffic(name: str) -> str:
    return f"{_path(name)}/traffic"


def _revision(revision: str) -> str:
    if not _REVISION.fullmatch(revision):
        raise InvalidCall(f"revision {revision!r}: expected 1 to 64 of 0-9 a-f")
    return revision


def _conditions(if_match: str | None, if_none_match: str | None) -> dict[str, str]:
    conditions = {"if-match": if_match, "if-none-match": if_none_match}
    return {
        header: value if value == "*" else f'"{_revision(value)}"'
        for header, value in conditions.items()
        if value is not None
    }


def _wait(wait: str | None) -> dict[str, str]:
    if wait is None:
        return {}
    if wait not in WAITS:
        raise InvalidCall(f"wait {wait!r}: expected one of {', '.join(WAITS)}")
    return {"wait": wait}


def _request_id(value: str | None) -> dict[str, str]:
    if value is None:
        return {}
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidCall(f"request id {value!r}: expected 1 to 128 of A-Za-z0-9._:-")
    return {"x-request-id": value}


def _request_key(value: str | None) -> dict[str, str]:
    if value is None:
        return {}
    if not _REQUEST_KEY.fullmatch(value):
        raise InvalidCall(f"request key {value[:40]!r}: expected 1 to 256 visible ASCII characters")
    return {"x-request-key": value}


def _json(content: Mapping[str, Any]) -> bytes:
    return _encoded(content)


def _encoded(content: object) -> bytes:
    try:
        return msgspec.json.encode(content)
    except (UnicodeEncodeError, msgspec.MsgspecError, TypeError) as error:
        raise InvalidCall(f"cannot be sent as JSON: {error}") from None
