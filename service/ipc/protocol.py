"""The messages between workers and engines, and how values become messages and values again.

A frame is one byte of version and a msgpack array of tagged messages. Anything else is refused with
`Undecodable`; nothing is ever unpickled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec
import numpy as np
from tokenizers import Tokenizer

from adapters import errors as adapter_errors
from adapters.errors import AdapterError
from adapters.format.events import Event
from adapters.format.spec import AdapterSpec, BackboneIdentity
from adapters.format.store import Revision
from adapters.format.uploads import ReceivedFile
from adapters.tokenizer import Encoding, TextEncoder
from service import errors as service_errors
from service.catalog.entry import (
    CatalogEntry,
    Change,
    ChangeResult,
    Condition,
    Inspection,
    Operation,
    Wait,
)
from service.catalog.traffic import Ending, Traffic
from service.drift.interface import DriftReport, UncertainText
from service.engine.interface import AdapterKey, Completion, EngineInfo, Entry, RowResult
from service.engine.load import FlowKey, Load
from service.engine.trials import DropReason, Pair, Role, Trial
from service.errors import ServiceError
from service.ipc.sent_specs import SentSpecs

VERSION = 1
_VERSION_BYTE = bytes([VERSION])

M = TypeVar("M")
Value: TypeAlias = str | int | float | bool | list[str | float] | None


class Undecodable(Exception):
    """The bytes are not a frame of this version; the message says why."""


class Malformed(ValueError):
    """A message has the right types, but its parts contradict each other."""


class EngineDefect(Exception):
    """The engine's process failed in an unforeseen way; its log has the details."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; each is tagged with the name of its class."""


class Fault(Message, frozen=True):
    """An error: the name of its class, its text and its attributes."""

    kind: str
    message: str
    fields: dict[str, Value]


class Adapter(Message, frozen=True):
    """A `CatalogEntry`. specs: JSON by revision; None: the receiver has it already."""

    name: str
    current: str | None
    revisions: list[Revision]
    specs: dict[str, str | None]
    unusable: dict[str, Fault]
    refusal: Fault | None
    traffic: Traffic | None = None
    events: list[Event] = []


# From a worker to the engine.


class Hello(Message, frozen=True):
    """Asks for a `Welcome`, the catalog and every change after it.

    worker: its number; a replacement for a dead worker has the same one. further: the sender is no
    worker but the engine of this number, which follows the first one.
    """

    worker: int
    further: bool = False


class HeartbeatReply(Message, frozen=True):
    """Answers a `Heartbeat` that asks, at once."""


class Predict(Message, frozen=True):
    """Entries of one request; arrays are little-endian, text after text.

    deadline: on the clock of `time.monotonic`, which all processes of a machine share. adapters:
    distinct (name, revision) pairs. rows: each row's index into them. lengths: of the texts.
    texts: each row's index into them; empty if every row has a text of its own. input_ids: int32.
    token_type_ids: uint8. truncated: one byte a text. client, weight: who shares the device, and in
    what proportion. trials: the rows that are part of one, and the fields of their `Trial`.
    bulk: as of `service.engine.interface.Predictor.predict`. uncounted: the rows that are not
    `counted`. elsewhere: another engine is asked if this one refuses.
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
    client: str
    weight: float
    texts: list[int] = []
    trials: list[tuple[int, str, str | None, int]] = []
    bulk: bool = False
    uncounted: list[int] = []
    elsewhere: bool = False


class Cancel(Message, frozen=True):
    """Nothing waits for this request any more."""

    id: int


class ChangeRequest(Message, frozen=True):
    """A `Change` of the catalog. An uploaded file is beside the store; its name is here."""

    id: int
    operation: Operation
    name: str
    condition: Condition
    revision: str | None
    file: ReceivedFile | None
    force: bool
    stage: bool
    traffic: Traffic | None
    ending: Ending | None
    wait: Wait
    card: str | None
    client: str
    request_id: str
    address: str


class DriftRequest(Message, frozen=True):
    """Asks for the `DriftReport` of a revision."""

    id: int
    name: str
    revision: str


class KeepTexts(Message, frozen=True):
    """Texts that a `PredictDone` asked for. It has no answer."""

    texts: list[UncertainText]


class UncertainRequest(Message, frozen=True):
    """Asks for the texts that are kept for a name. forget: remove them, and answer with none."""

    id: int
    name: str
    forget: bool


class Inspect(Message, frozen=True):
    """Asks what publishing a file would come to, without doing it. The file is beside the store."""

    id: int
    file: ReceivedFile


class Preloaded(Message, frozen=True):
    """A further engine has tried to load what a `Preload` named."""

    id: int


class UsedRevisions(Message, frozen=True):
    """A further engine's answer to `AskUsed`."""

    id: int
    revisions: list[str]


class Counted(Message, frozen=True):
    """Texts that a further engine has answered: name, revision, and the bins of
    `adapters.profiles.Bins`."""

    texts: list[tuple[str, str, list[int]]]


class TrialRead(Message, frozen=True):
    """This and the four messages after it: a further engine's calls of
    `service.engine.trials.TrialListener`."""

    name: str
    candidate: str
    role: Role
    texts: int
    seconds: float | None


class TrialFailed(Message, frozen=True):
    name: str
    candidate: str
    revision: str
    role: Role
    texts: int


class TrialCompared(Message, frozen=True):
    """pairs: float32 scores of the current revision and of the candidate."""

    name: str
    candidate: str
    pairs: list[tuple[bytes, bytes]]


class TrialDropped(Message, frozen=True):
    name: str
    candidate: str
    texts: int
    reason: DropReason


class TrialUnreadable(Message, frozen=True):
    name: str
    revision: str
    reason: str


class Applied(Message, frozen=True):
    """This worker has every catalog update up to this number."""

    update: int


class Goodbye(Message, frozen=True):
    """This worker ends and expects nothing more."""


# From an engine to a worker, or from the first engine to a further one.


class Heartbeat(Message, frozen=True):
    """The engine's health, every half second and after each renewal of a replica's lease.

    asks: whether it is to be answered; the answer is answered by one that does not ask. heard: when
    the engine last heard of the worker, whose own lease begins then, on the clock of
    `time.monotonic`. lease: as of `EngineHealth`.
    """

    heard: float
    live: bool
    ready: bool
    reason: str | None
    # Counts stay whole numbers.
    details: dict[str, int | float | str]
    lease: float | None = None
    asks: bool = True


class EngineLoad(Message, frozen=True):
    """A `Load`, while requests come. waits: client, adapter, urgency, seconds, barred. workers:
    that are connected."""

    workers: int
    at: float
    limit: int
    rate: float
    correction: float
    waits: list[tuple[str, str, int, float, bool]]
    otherwise: float


class Preload(Message, frozen=True):
    """Asks a further engine to load a revision, if that evicts no other, and then for
    `Preloaded`."""

    id: int
    name: str
    revision: str


class Retire(Message, frozen=True):
    """A revision is served no longer. It has no answer."""

    name: str
    revision: str


class Forget(Message, frozen=True):
    """The texts that were kept for a name were removed. It has no answer."""

    name: str


class AskUsed(Message, frozen=True):
    """Asks a further engine which revisions of a name its requests hold or wait for."""

    id: int
    name: str


class Welcome(Message, frozen=True):
    """What a worker needs to encode texts; the catalog follows it.

    tokenizer: the JSON of the tokenizers library. The other fields are those of `EngineInfo`.
    """

    tokenizer: str
    backbone: str
    backbone_revision: str | None
    fingerprint: str
    max_tokens: int
    hidden_size: int
    intermediate_size: int
    embedding_size: int
    layers: int
    device: str
    dtype: str


class Adapters(Message, frozen=True):
    """A part of the catalog, after a `Welcome`. last: the receiver has all of it. Updates may come
    between two parts, also of names that have not been sent."""

    adapters: list[Adapter]
    last: bool


class UnknownWorker(Message, frozen=True):
    """The engine does not know the sender: it must say `Hello` on a new connection."""


class PredictDone(Message, frozen=True):
    """labels: the number of labels of each row. scores, weights: float32, row after row; weights
    only if the request asked for them. weighed: the number of weights of each row; 0 if its prompt
    is not made from the text. uncertain: the rows whose texts shall be sent, to be kept. shared:
    as of `Completion`."""

    id: int
    queue_seconds: float
    inference_seconds: float
    labels: list[int]
    scores: bytes
    weights: bytes | None
    weighed: list[int] = []
    uncertain: list[int] = []
    shared: int = 0


class RequestFailed(Message, frozen=True):
    id: int
    fault: Fault


class DriftDone(Message, frozen=True):
    id: int
    report: DriftReport


class UncertainDone(Message, frozen=True):
    """removed: how many texts were, if that was asked for."""

    id: int
    texts: list[UncertainText]
    removed: int


class ChangeDone(Message, frozen=True):
    """Every worker has applied the change."""

    id: int
    result: ChangeResult


class InspectDone(Message, frozen=True):
    """An `Inspection`. spec: as JSON."""

    id: int
    spec: str | None
    refusal: Fault | None


class CatalogUpdate(Message, frozen=True):
    """A name's new entry; None: the name was deleted. Workers answer `Applied`."""

    update: int
    name: str
    adapter: Adapter | None


FromWorker: TypeAlias = (
    Hello
    | HeartbeatReply
    | Predict
    | Cancel
    | ChangeRequest
    | DriftRequest
    | KeepTexts
    | UncertainRequest
    | Inspect
    | Applied
    | Goodbye
    | Preloaded
    | UsedRevisions
    | Counted
    | TrialRead
    | TrialFailed
    | TrialCompared
    | TrialDropped
    | TrialUnreadable
)
FromEngine: TypeAlias = (
    Heartbeat
    | EngineLoad
    | Welcome
    | Adapters
    | UnknownWorker
    | PredictDone
    | RequestFailed
    | DriftDone
    | UncertainDone
    | ChangeDone
    | InspectDone
    | CatalogUpdate
    | Preload
    | Retire
    | Forget
    | AskUsed
)


class Codec(Generic[M]):
    """Decodes the frames of one direction.

    Args:
        expected: the union of messages that may arrive.
    """

    def __init__(self, expected: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[expected])

    def decode(self, frame: bytes) -> list[M]:
        """
        Raises:
            Undecodable: another version or other messages.
        """
        if frame[:1] != _VERSION_BYTE:
            raise Undecodable(f"version {frame[0]}, expected {VERSION}" if frame else "empty")
        try:
            return self._decoder.decode(memoryview(frame)[1:])
        except (msgspec.DecodeError, RecursionError) as error:
            raise Undecodable(str(error)[:200]) from None


def encode(messages: Sequence[Message]) -> bytes:
    """One frame of messages with the same receiver."""
    buffer = bytearray(_VERSION_BYTE)
    _ENCODER.encode_into(messages, buffer, 1)
    return bytes(buffer)


_ENCODER = msgspec.msgpack.Encoder()

# The errors that may cross, by name. Both packages define trees of classes and nothing else.
_ERRORS: dict[str, type[AdapterError | ServiceError]] = {
    name: value
    for module in (service_errors, adapter_errors)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, (AdapterError, ServiceError))
}


def fault_of(error: BaseException) -> Fault:
    """An error as a message. For a defect, only the name of its class leaves the process."""
    if not isinstance(error, (AdapterError, ServiceError)):
        return Fault("EngineDefect", type(error).__name__, {})
    fields: dict[str, Value] = {
        name: list(map(_encodable, value)) if isinstance(value, tuple) else _encodable(value)
        for name, value in vars(error).items()
    }
    return Fault(type(error).__name__, _encodable(str(error)), fields)


def _encodable(value: Any) -> Any:
    """An error may quote anything, the name of a file for instance: its lone surrogates become
    escapes."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def failed_instead(message: Message, error: Exception) -> Message | None:
    """What the engine sends in place of a message that cannot be encoded, if anything."""
    match message:
        case PredictDone() | DriftDone() | UncertainDone() | ChangeDone() | InspectDone():
            return RequestFailed(message.id, fault_of(error))
        case RequestFailed():
            return RequestFailed(message.id, fault_of(error))
        case CatalogUpdate():
            # The worker must not go on with what it had: it refuses the name until its next update.
            return CatalogUpdate(message.update, message.name, None)
    return None


def error_of(fault: Fault) -> AdapterError | ServiceError | EngineDefect:
    """The same error, rebuilt from its text and attributes without calling its constructor."""
    error_type = _ERRORS.get(fault.kind)
    if error_type is None:
        return EngineDefect(f"{fault.kind}: {fault.message}")
    error = error_type.__new__(error_type, fault.message)
    for name, value in fault.fields.items():
        setattr(error, name, tuple(value) if isinstance(value, list) else value)
    return error


def predict_of(
    number: int,
    entries: Sequence[Entry],
    deadline: float | None,
    client: str = "",
    weight: float = 1.0,
    *,
    bulk: bool = False,
    elsewhere: bool = False,
) -> Predict:
    """A request as a message; token ids are narrowed to 32 bits, which fit every vocabulary."""
    adapters: dict[AdapterKey, int] = {}
    rows = [adapters.setdefault(entry.adapter, len(adapters)) for entry in entries]
    encodings = [entry.encoding for entry in entries]
    texts: list[int] = []
    # A text for several adapters is one object; it is sent once, and read as one object there.
    distinct = {id(encoding): encoding for encoding in encodings}
    if len(distinct) < len(encodings):
        numbers = {key: number for number, key in enumerate(distinct)}
        texts = [numbers[id(encoding)] for encoding in encodings]
        encodings = list(distinct.values())
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
        texts=texts,
        explain=entries[0].explain,
        client=client,
        weight=weight,
        trials=[
            (index, *entry.trial) for index, entry in enumerate(entries) if entry.trial is not None
        ],
        bulk=bulk,
        uncounted=[index for index, entry in enumerate(entries) if not entry.counted],
        elsewhere=elsewhere,
    )


def entries_of(message: Predict) -> list[Entry]:
    """
    Raises:
        Malformed: lengths, rows and arrays contradict each other.
    """
    keys = [AdapterKey(name, revision) for name, revision in message.adapters]
    count, tokens, distinct = len(message.rows), sum(message.lengths), len(message.lengths)
    texts = message.texts or range(count)
    consistent = (
        count == len(message.costs) == len(texts)
        and distinct == len(message.truncated)
        and min(texts, default=0) >= 0
        and max(texts, default=-1) < distinct
        and len(message.input_ids) == 4 * tokens
        and len(message.token_type_ids) == tokens
        and min(message.lengths, default=1) > 0
        and min(message.costs, default=1) > 0
        and min(message.rows, default=0) >= 0
        and max(message.rows, default=-1) < len(keys)
        and (
            not message.trials
            or all(0 <= row < count and cost >= 0 for row, _, _, cost in message.trials)
        )
        and (not message.uncounted or all(0 <= row < count for row in message.uncounted))
    )
    if not consistent:
        raise Malformed("the parts of a request contradict each other")
    input_ids = np.frombuffer(message.input_ids, "<i4").astype(np.int64)
    types = np.frombuffer(message.token_type_ids, "u1").astype(np.int64)
    encodings, start = [], 0
    for length, cut in zip(message.lengths, message.truncated, strict=True):
        end = start + length
        encodings.append(Encoding(input_ids[start:end], types[start:end], bool(cut)))
        start = end
    entries = [
        Entry(keys[row], encodings[text], cost, message.explain)
        for row, text, cost in zip(message.rows, texts, message.costs, strict=True)
    ]
    for row, candidate, other, cost in message.trials:
        entries[row].trial = Trial(candidate, other, cost)
    for row in message.uncounted:
        entries[row].counted = False
    return entries


def predict_done_of(number: int, completion: Completion) -> PredictDone:
    """An answer as a message; with weights if all rows have them."""
    rows = completion.rows
    weights = [row.token_weights for row in rows if row.token_weights is not None]
    return PredictDone(
        id=number,
        queue_seconds=completion.queue_seconds,
        inference_seconds=completion.inference_seconds,
        labels=[len(row.scores) for row in rows],
        scores=_joined([row.scores for row in rows], "<f4"),
        weights=_joined(weights, "<f4") if rows and len(weights) == len(rows) else None,
        weighed=[len(weights_of_row) for weights_of_row in weights],
        uncertain=list(completion.uncertain),
        shared=completion.shared,
    )


def completion_of(message: PredictDone, entries: Sequence[Entry]) -> Completion:
    """The answer to these entries.

    Raises:
        Malformed: it does not fit these entries.
    """
    if (
        len(message.labels) != len(entries)
        or not all(0 <= row < len(entries) for row in message.uncertain)
        or len(message.scores) != 4 * sum(message.labels)
        or (message.weights is not None and not _fit(message.weights, message.weighed, entries))
    ):
        raise Malformed("the answer does not fit its request")
    scores = _split(message.scores, message.labels)
    if message.weights is None:
        rows = tuple(map(RowResult, scores))
    else:
        weights = _split(message.weights, message.weighed)
        rows = tuple(map(RowResult, scores, weights))
    return Completion(
        rows,
        message.queue_seconds,
        message.inference_seconds,
        tuple(message.uncertain),
        message.shared,
    )


def _fit(weights: bytes, weighed: Sequence[int], entries: Sequence[Entry]) -> bool:
    """Whether every row has a weight for each of its tokens, or none."""
    return (
        len(weighed) == len(entries)
        and len(weights) == 4 * sum(weighed)
        and all(
            count in (0, len(entry.encoding)) for count, entry in zip(weighed, entries, strict=True)
        )
    )


def change_request_of(number: int, change: Change) -> ChangeRequest:
    return ChangeRequest(
        number, **{item.name: getattr(change, item.name) for item in fields(change)}
    )


def change_of(message: ChangeRequest) -> Change:
    """
    Raises:
        Malformed: an operation without its file, division, ending or card, or another with it.
    """
    for part, operation in (
        (message.file, "publish"),
        (message.traffic, "divide"),
        (message.ending, "end_traffic"),
        (message.card, "describe"),
    ):
        if (part is not None) != (message.operation == operation):
            raise Malformed(f"{operation} without what belongs to it, or another with it")
    return Change(**{item.name: getattr(message, item.name) for item in fields(Change)})


def inspect_done_of(number: int, inspection: Inspection) -> InspectDone:
    spec, refusal = inspection.spec, inspection.refusal
    return InspectDone(
        number,
        None if spec is None else spec.to_json(),
        None if refusal is None else fault_of(refusal),
    )


def inspection_of(message: InspectDone) -> Inspection:
    """
    Raises:
        Malformed: its refusal is not an error of an adapter.
    """
    return Inspection(
        None if message.spec is None else AdapterSpec.model_validate_json(message.spec),
        None if message.refusal is None else _adapter_error(message.refusal),
    )


def adapter_of(entry: CatalogEntry, known: Mapping[str, AdapterSpec]) -> Adapter:
    """An entry as a message, without the specs that the receiver has: those in `known`."""
    return Adapter(
        name=entry.name,
        current=entry.current,
        revisions=list(entry.revisions),
        specs={
            revision: None if known.get(revision) is spec else spec.to_json()
            for revision, spec in entry.specs.items()
        },
        unusable={revision: fault_of(error) for revision, error in entry.unusable.items()},
        refusal=None if entry.refusal is None else fault_of(entry.refusal),
        traffic=entry.traffic,
        events=list(entry.events),
    )


def entry_of(message: Adapter, known: Mapping[str, AdapterSpec]) -> CatalogEntry:
    """
    Raises:
        Malformed: a spec was left out that is not in `known`, or an error is not an adapter's.
    """
    try:
        specs = SentSpecs.taken(message.specs, known)
    except KeyError as missing:
        revision = missing.args[0]
        raise Malformed(f"adapter {message.name!r}: the spec of {revision} is missing") from None
    return CatalogEntry(
        name=message.name,
        current=message.current,
        revisions=tuple(message.revisions),
        specs=specs,
        unusable={revision: _adapter_error(item) for revision, item in message.unusable.items()},
        refusal=None if message.refusal is None else _adapter_error(message.refusal),
        traffic=message.traffic,
        events=tuple(message.events),
    )


def trial_compared_of(name: str, candidate: str, pairs: Sequence[Pair]) -> TrialCompared:
    as_bytes = [
        (_joined([pair.current], "<f4"), _joined([pair.candidate], "<f4")) for pair in pairs
    ]
    return TrialCompared(name, candidate, as_bytes)


def pairs_of(message: TrialCompared) -> list[Pair]:
    """
    Raises:
        Malformed: a text without scores, or with a part of one.
    """
    if not all(scores and len(scores) % 4 == 0 for pair in message.pairs for scores in pair):
        raise Malformed("the scores of a text are not whole")
    return [
        Pair(np.frombuffer(current, "<f4"), np.frombuffer(candidate, "<f4"))
        for current, candidate in message.pairs
    ]


def engine_load_of(load: Load, workers: int) -> EngineLoad:
    return EngineLoad(
        workers=workers,
        at=load.at,
        limit=load.limit,
        rate=load.rate,
        correction=load.correction,
        waits=[(*key, *wait) for key, wait in load.waits.items()],
        otherwise=load.otherwise,
    )


def load_of(message: EngineLoad) -> Load:
    return Load(
        at=message.at,
        limit=message.limit,
        rate=message.rate,
        correction=message.correction,
        waits={
            FlowKey(client, adapter, urgency): (seconds, barred)
            for client, adapter, urgency, seconds, barred in message.waits
        },
        otherwise=message.otherwise,
    )


def welcome_of(info: EngineInfo) -> Welcome:
    return Welcome(
        tokenizer=info.encoder.to_json(),
        backbone=info.identity.name,
        backbone_revision=info.identity.revision,
        fingerprint=info.identity.fingerprint,
        max_tokens=info.max_tokens,
        hidden_size=info.hidden_size,
        intermediate_size=info.intermediate_size,
        embedding_size=info.embedding_size,
        layers=info.layers,
        device=info.device,
        dtype=info.dtype,
    )


def info_of(message: Welcome, encoder: TextEncoder | None = None) -> EngineInfo:
    """
    Args:
        encoder: of an earlier welcome with the same tokenizer, which takes 0.3 s to read.
    """
    return EngineInfo(
        encoder=encoder or TextEncoder(Tokenizer.from_str(message.tokenizer)),
        identity=BackboneIdentity(
            name=message.backbone,
            revision=message.backbone_revision,
            fingerprint=message.fingerprint,
        ),
        max_tokens=message.max_tokens,
        hidden_size=message.hidden_size,
        intermediate_size=message.intermediate_size,
        embedding_size=message.embedding_size,
        layers=message.layers,
        device=message.device,
        dtype=message.dtype,
    )


def _adapter_error(fault: Fault) -> AdapterError:
    error = error_of(fault)
    if not isinstance(error, AdapterError):
        raise Malformed(f"{fault.kind} is not an error of an adapter")
    return error


def _joined(arrays: Sequence[Any], dtype: str) -> bytes:
    """One-dimensional arrays, one after the other."""
    if len(arrays) == 1:
        return bytes(arrays[0].astype(dtype).tobytes())
    return np.concatenate(arrays).astype(dtype).tobytes() if arrays else b""


def _split(data: bytes, lengths: Sequence[int]) -> list[Any]:
    """float32 arrays of these lengths."""
    whole = np.frombuffer(data, "<f4")
    if len(lengths) == 1:
        return [whole]
    parts, start = [], 0
    for length in lengths:
        parts.append(whole[start : start + length])
        start += length
    return parts
