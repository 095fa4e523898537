"""What crosses between the processes: tagged messages, many to a frame. Knows no socket.

A frame is one byte of version and a msgpack array of messages. Whatever else it holds is refused
with `Undecodable`; nothing is ever unpickled or run.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec

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
