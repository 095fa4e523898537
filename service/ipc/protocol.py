"""What crosses between the processes: tagged messages, many to a frame. Knows no socket.

A frame is one byte of version and a msgpack array of messages. Whatever else it holds is refused
with `Undecodable`; nothing is ever unpickled or run.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec
import numpy as np
from tokenizers import Tokenizer

from adapters import errors as adapter_errors
from adapters.backbone.tokenizer import Encoding, TextEncoder
from adapters.errors import AdapterError
from adapters.format.spec import AdapterSpec, BackboneIdentity
from adapters.format.store import Revision
from service import errors as service_errors
from service.catalog.entry import CatalogEntry, Condition
from service.engine.interface import AdapterKey, Completion, EngineInfo, Entry, RowResult
from service.errors import ServiceError

# --- merged from service.processes.messages

VERSION = 1
_VERSION_BYTE = bytes([VERSION])

M = TypeVar("M")
Value: TypeAlias = str | int | float | bool | list[str | float] | None


class Undecodable(Exception):
    """These bytes are no frame of this version; the message says why."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of all that crosses, told apart by the names of the classes."""


class Fault(Message, frozen=True):
    """An error by the name of its class, its words, and its attributes."""

    kind: str
    message: str
    fields: dict[str, Value]


class StoredRevision(Message, frozen=True):
    """stored: seconds since the epoch."""

    revision: str
    stored: float
    size: int


class Adapter(Message, frozen=True):
    """A `CatalogEntry`. specs: JSON by revision; None: as last time."""

    name: str
    current: str | None
    revisions: list[StoredRevision]
    specs: dict[str, str | None]
    unusable: dict[str, Fault]
    refusal: Fault | None


class Conditions(Message, frozen=True):
    match: list[str] | None
    none_match: list[str] | None


# From a worker to the engine.


class Hello(Message, frozen=True):
    """Tell me everything, and then what changes. worker: its number, which a successor takes."""

    worker: int


class Alive(Message, frozen=True):
    """The answer to a `Beat`, at once."""


class Predict(Message, frozen=True):
    """Entries of one request; arrays are little-endian and row after row.

    deadline: of `time.monotonic`, one clock for all processes of a machine. adapters: distinct
    (name, revision) pairs. rows: which of them each row asks. input_ids: int32. token_type_ids:
    uint8. truncated: one byte a row.
    """

    id: int
    deadline: float | None
    adapters: list[tuple[str, str]]
    rows: list[int]
    lengths: list[int]
    costs: list[int]
    input_ids: bytes
    token_type_ids: bytes
    truncated: bytes
    explain: bool


class Cancel(Message, frozen=True):
    """Nobody waits for this request any more."""

    id: int


class Publish(Message, frozen=True):
    """The adapter file is the next part of the same multipart message."""

    id: int
    name: str
    condition: Conditions


class Rollback(Message, frozen=True):
    id: int
    name: str
    prefix: str | None
    condition: Conditions


class Delete(Message, frozen=True):
    id: int
    name: str
    condition: Conditions


class Unload(Message, frozen=True):
    id: int
    name: str


class Reload(Message, frozen=True):
    id: int
    name: str


class Settle(Message, frozen=True):
    """Answer when no change of this name is under way."""

    id: int
    name: str


class Applied(Message, frozen=True):
    """Every change up to this one is in the replica."""

    change: int


class Goodbye(Message, frozen=True):
    """This worker ends; it expects nothing more."""


# From the engine to a worker.


class Beat(Message, frozen=True):
    """The engine's health, every half second. sent: of `time.monotonic`, see `link`."""

    sent: float
    live: bool
    ready: bool
    reason: str | None
    details: dict[str, float | str]


class Welcome(Message, frozen=True):
    """What a worker must know to encode and resolve; from here on it is told what changes.

    tokenizer: as its library's JSON. The rest is that of `EngineInfo`.
    """

    tokenizer: str
    backbone: str
    backbone_revision: str | None
    fingerprint: str
    max_tokens: int
    hidden_size: int
    layers: int
    device: str
    dtype: str
    adapters: list[Adapter]


class Stranger(Message, frozen=True):
    """The engine does not know who asked: say `Hello` on a new connection."""


class Answered(Message, frozen=True):
    """labels: of each row. scores and weights: float32, row after row; weights if asked for."""

    id: int
    queue_seconds: float
    inference_seconds: float
    labels: list[int]
    scores: bytes
    weights: bytes | None


class Failed(Message, frozen=True):
    id: int
    fault: Fault


class Done(Message, frozen=True):
    """A change holds in every worker. revision: what is served now; of a deletion none is."""

    id: int
    revision: str
    created: bool
    changed: bool


class Changed(Message, frozen=True):
    """Changes are numbered; workers answer `Applied`."""

    change: int
    adapter: Adapter


class Removed(Message, frozen=True):
    change: int
    name: str


Change: TypeAlias = Publish | Rollback | Delete | Unload | Reload | Settle
FromWorker: TypeAlias = Hello | Alive | Predict | Cancel | Change | Applied | Goodbye
FromEngine: TypeAlias = Beat | Welcome | Stranger | Answered | Failed | Done | Changed | Removed


class Codec(Generic[M]):
    """Frames of one direction.

    Args:
        expected: a union of messages; anything else is undecodable.
    """

    def __init__(self, expected: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[expected])

    def decode(self, frame: bytes) -> list[M]:
        """
        Raises:
            Undecodable: another version, or not such messages.
        """
        if frame[:1] != _VERSION_BYTE:
            raise Undecodable(f"version {frame[0]}, expected {VERSION}" if frame else "empty")
        try:
            return self._decoder.decode(memoryview(frame)[1:])
        except msgspec.DecodeError as error:
            raise Undecodable(str(error)[:200]) from None


def encode(messages: Sequence[Message]) -> bytes:
    """One frame of messages that go the same way."""
    buffer = bytearray(_VERSION_BYTE)
    _ENCODER.encode_into(messages, buffer, 1)
    return bytes(buffer)


_ENCODER = msgspec.msgpack.Encoder()


# --- merged from service.processes.values

E = TypeVar("E", bound=Exception)
Refusal: TypeAlias = AdapterError | ServiceError


def _classes(module: Any, base: type[E]) -> dict[str, type[E]]:
    found = (item for item in vars(module).values() if isinstance(item, type))
    return {item.__name__: item for item in found if issubclass(item, base)}


_ADAPTER_ERRORS = _classes(adapter_errors, AdapterError)
_SERVICE_ERRORS = _classes(service_errors, ServiceError)


class EngineDefect(Exception):
    """The engine's process failed in a way that nobody foresaw; its log says how."""


class Malformed(ValueError):
    """A message of the right types whose parts do not belong together."""


def fault_of(error: BaseException) -> Fault:
    """An error as a message; of a defect only the name of its class leaves the process."""
    if not isinstance(error, (AdapterError, ServiceError)):
        return Fault("EngineDefect", type(error).__name__, {})
    fields: dict[str, Value] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(error).items()
    }
    return Fault(type(error).__name__, str(error), fields)


def error_of(fault: Fault) -> AdapterError | ServiceError | EngineDefect:
    """The same error, whatever the arguments that it was made with: its words and attributes."""
    known = _ADAPTER_ERRORS.get(fault.kind) or _SERVICE_ERRORS.get(fault.kind)
    if known is None:
        return EngineDefect(f"{fault.kind}: {fault.message}")
    error = known.__new__(known, fault.message)
    for name, value in fault.fields.items():
        setattr(error, name, tuple(value) if isinstance(value, list) else value)
    return error


def predict_of(number: int, entries: Sequence[Entry], deadline: float | None) -> Predict:
    """A request; token ids are narrowed to 32 bits, which every vocabulary fits."""
    adapters: dict[AdapterKey, int] = {}
    rows = [adapters.setdefault(entry.adapter, len(adapters)) for entry in entries]
    encodings = [entry.encoding for entry in entries]
    return Predict(
        id=number,
        deadline=deadline,
        adapters=[(key.name, key.revision) for key in adapters],
        rows=rows,
        lengths=[len(encoding) for encoding in encodings],
        costs=[entry.cost for entry in entries],
        input_ids=_joined([encoding.input_ids for encoding in encodings], "<i4"),
        token_type_ids=_joined([encoding.token_type_ids for encoding in encodings], "u1"),
        truncated=bytes(encoding.truncated for encoding in encodings),
        explain=entries[0].explain,
    )


def entries_of(message: Predict) -> list[Entry]:
    """
    Raises:
        Malformed: lengths, rows and arrays do not belong together.
    """
    keys = [AdapterKey(name, revision) for name, revision in message.adapters]
    count, tokens = len(message.rows), sum(message.lengths)
    consistent = (
        count == len(message.lengths) == len(message.costs) == len(message.truncated)
        and len(message.input_ids) == 4 * tokens
        and len(message.token_type_ids) == tokens
        and min(message.lengths, default=1) > 0
        and min(message.costs, default=1) > 0
        and min(message.rows, default=0) >= 0
        and max(message.rows, default=-1) < len(keys)
    )
    if not consistent:
        raise Malformed("the parts of a request do not belong together")
    input_ids = np.frombuffer(message.input_ids, "<i4").astype(np.int64)
    types = np.frombuffer(message.token_type_ids, "u1").astype(np.int64)
    entries, start = [], 0
    for row, length, cost, cut in zip(
        message.rows, message.lengths, message.costs, message.truncated, strict=True
    ):
        end = start + length
        encoding = Encoding(input_ids[start:end], types[start:end], bool(cut))
        entries.append(Entry(keys[row], encoding, cost, message.explain))
        start = end
    return entries


def answered_of(number: int, completion: Completion) -> Answered:
    """An answer; with weights if all rows have them."""
    rows = completion.rows
    weights = [row.token_weights for row in rows if row.token_weights is not None]
    return Answered(
        id=number,
        queue_seconds=completion.queue_seconds,
        inference_seconds=completion.inference_seconds,
        labels=[len(row.scores) for row in rows],
        scores=_joined([row.scores for row in rows], "<f4"),
        weights=_joined(weights, "<f4") if rows and len(weights) == len(rows) else None,
    )


def completion_of(message: Answered, entries: Sequence[Entry]) -> Completion:
    """The answer to these entries.

    Raises:
        Malformed: it is the answer to others.
    """
    lengths = [len(entry.encoding) for entry in entries]
    expected = None if message.weights is None else 4 * sum(lengths)
    if (
        len(message.labels) != len(entries)
        or len(message.scores) != 4 * sum(message.labels)
        or (message.weights is not None and len(message.weights) != expected)
    ):
        raise Malformed("the answer does not belong to its request")
    scores = _split(message.scores, message.labels)
    if message.weights is None:
        rows = tuple(RowResult(item) for item in scores)
    else:
        weights = _split(message.weights, lengths)
        rows = tuple(map(RowResult, scores, weights))
    return Completion(rows, message.queue_seconds, message.inference_seconds)


def adapter_of(entry: CatalogEntry, known: Mapping[str, AdapterSpec]) -> Adapter:
    """An entry; specs of revisions in `known` are left out, for who was told of them before."""
    return Adapter(
        name=entry.name,
        current=entry.current,
        revisions=[
            StoredRevision(item.revision, item.stored.timestamp(), item.size)
            for item in entry.revisions
        ],
        specs={
            revision: None if known.get(revision) is spec else spec.to_json()
            for revision, spec in entry.specs.items()
        },
        unusable={revision: fault_of(error) for revision, error in entry.unusable.items()},
        refusal=None if entry.refusal is None else fault_of(entry.refusal),
    )


def entry_of(message: Adapter, known: Mapping[str, AdapterSpec]) -> CatalogEntry:
    """
    Raises:
        Malformed: a spec that was left out is not known here either, or an error is none.
    """
    specs: dict[str, AdapterSpec] = {}
    for revision, text in message.specs.items():
        if text is None and revision not in known:
            raise Malformed(f"adapter {message.name!r}: nothing was said of {revision}")
        specs[revision] = known[revision] if text is None else AdapterSpec.model_validate_json(text)
    return CatalogEntry(
        name=message.name,
        current=message.current,
        revisions=tuple(
            Revision(item.revision, datetime.fromtimestamp(item.stored, UTC), item.size)
            for item in message.revisions
        ),
        specs=specs,
        unusable={revision: _adapter_error(item) for revision, item in message.unusable.items()},
        refusal=None if message.refusal is None else _adapter_error(message.refusal),
    )


def conditions_of(condition: Condition) -> Conditions:
    match, none_match = condition.match, condition.none_match
    return Conditions(
        None if match is None else sorted(match),
        None if none_match is None else sorted(none_match),
    )


def condition_of(message: Conditions) -> Condition:
    match, none_match = message.match, message.none_match
    return Condition(
        None if match is None else frozenset(match),
        None if none_match is None else frozenset(none_match),
    )


def welcome_of(info: EngineInfo, entries: Sequence[CatalogEntry]) -> Welcome:
    return Welcome(
        tokenizer=info.encoder.to_json(),
        backbone=info.identity.name,
        backbone_revision=info.identity.revision,
        fingerprint=info.identity.fingerprint,
        max_tokens=info.max_tokens,
        hidden_size=info.hidden_size,
        layers=info.layers,
        device=info.device,
        dtype=info.dtype,
        adapters=[adapter_of(entry, {}) for entry in entries],
    )


def info_of(message: Welcome) -> EngineInfo:
    return EngineInfo(
        encoder=TextEncoder(Tokenizer.from_str(message.tokenizer)),
        identity=BackboneIdentity(
            name=message.backbone,
            revision=message.backbone_revision,
            fingerprint=message.fingerprint,
        ),
        max_tokens=message.max_tokens,
        hidden_size=message.hidden_size,
        layers=message.layers,
        device=message.device,
        dtype=message.dtype,
    )


def _adapter_error(fault: Fault) -> AdapterError:
    error = error_of(fault)
    if not isinstance(error, AdapterError):
        raise Malformed(f"{fault.kind} is no error of an adapter")
    return error


def _joined(arrays: Sequence[Any], dtype: str) -> bytes:
    """Arrays of one dimension, one behind the other."""
    if len(arrays) == 1:
        return bytes(arrays[0].astype(dtype).tobytes())
    return np.concatenate(arrays).astype(dtype).tobytes() if arrays else b""


def _split(data: bytes, lengths: Sequence[int]) -> list[Any]:
    """float32 arrays of these lengths."""
    whole = np.frombuffer(data, "<f4")
    if len(lengths) == 1:
        return [whole]
    found, start = [], 0
    for length in lengths:
        found.append(whole[start : start + length])
        start += length
    return found
