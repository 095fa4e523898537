"""What the shared store holds besides objects: log entries, snapshots, replicas, the cluster.

All of it is JSON with a `format`. Readers refuse a newer format whole: half of a change that they
do not understand is worse than none.
"""

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from adapters.errors import DamagedStore, NewerStore
from adapters.format.events import Event
from adapters.format.spec import BackboneIdentity

# Of every file that this version writes; it reads this one and older ones.
FORMAT: Final = 1

Kind: TypeAlias = Literal["prepare", "commit", "abort"]

_STRICT = with_config(ConfigDict(extra="forbid"))


@_STRICT
@dataclass(frozen=True, slots=True)
class RevisionRecord:
    """One revision of a name. size: in bytes. stored: when it was uploaded, by the clock of the
    replica that received it. spec: the adapter's spec as JSON text."""

    revision: str
    size: int
    stored: datetime
    spec: str


@_STRICT
@dataclass(frozen=True, slots=True)
class NameRecord:
    """The whole state of a name. revisions: at least one, the current one first. traffic: how its
    requests are divided, if another revision serves some. events: the newest first."""

    revisions: tuple[RevisionRecord, ...]
    traffic: dict[str, Any] | None = None
    events: tuple[Event, ...] = ()

    @property
    def current(self) -> str:
        return self.revisions[0].revision


@_STRICT
@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the log.

    number: its place, from 1. change: the id of the change; its prepare, commit and abort share it.
    operation: what was asked for, such as `publish`. record: the state of the name after a commit,
    or after the commit that a prepare announces; None: deleted. by: the replica that wrote it. at:
    that replica's wall clock in ISO 8601, for people only.
    """

    number: int
    kind: Kind
    change: str
    name: str
    operation: str
    record: NameRecord | None
    by: str
    at: str


@_STRICT
@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica tells the others; only it writes this.

    beat: counts its writes, so that others see on their own clocks that it lives. applied: the last
    entry of the log that its answers show. ready: changes that it has prepared. refused: changes
    that it refuses, and why. lease_seconds: how long it may answer after it has read the log's end.
    """

    id: str
    beat: int
    applied: int
    ready: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    lease_seconds: float = 5.0
    about: dict[str, Any] = field(default_factory=dict)


@_STRICT
@dataclass(frozen=True, slots=True)
class Cluster:
    """Written once for each store. cluster: a random id, which tells stores apart."""

    cluster: str
    backbone: BackboneIdentity


@_STRICT
@dataclass(frozen=True, slots=True)
class LogState:
    """The state after an entry: the contents of a snapshot.

    number: the entry's. names: every name's record. pending: prepared changes that were neither
    committed nor aborted, by their id. collected: all entries up to this number were collected.
    """

    number: int = 0
    names: dict[str, NameRecord] = field(default_factory=dict)
    pending: dict[str, Entry] = field(default_factory=dict)
    collected: int = 0

    def records(self) -> list[tuple[str, NameRecord | None]]:
        """The name and the record of every name and of every prepared change."""
        prepared = [(entry.name, entry.record) for entry in self.pending.values()]
        return [*self.names.items(), *prepared]


def apply(state: LogState, entry: Entry) -> None:
    """Change the maps of a state by the log's next entry; `number` is the caller's to advance."""
    if entry.kind == "prepare":
        state.pending[entry.change] = entry
        return
    state.pending.pop(entry.change, None)
    if entry.kind == "commit":
        if entry.record is None:
            state.names.pop(entry.name, None)
        else:
            state.names[entry.name] = entry.record


# --- JSON ---

Record = TypeVar("Record", Entry, ReplicaState, Cluster, LogState)

_ADAPTERS: dict[type, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (Entry, ReplicaState, Cluster, LogState)
}


# In the place of a collected entry. The place is never free again, so no late writer can take it.
COLLECTED: Final = b'{"format":1,"collected_entry":true}'
_FORMAT_FIRST = re.compile(rb'\{"format":(\d+),')


def encode(record: Entry | ReplicaState | Cluster | LogState) -> bytes:
    """One line of JSON, with the format first."""
    body: bytes = _ADAPTERS[type(record)].dump_json(record)
    return b'{"format":%d,' % FORMAT + body[1:]


def decode(kind: type[Record], key: str, content: bytes) -> Record:
    """
    Args:
        key: the object's, for the errors.

    Raises:
        NewerStore: a newer version wrote it.
        DamagedStore: it is not such a record.
    """
    head = _FORMAT_FIRST.match(content)
    if head is None:
        raise DamagedStore(f"{key} in the shared store is damaged: it does not begin with a format")
    if int(head[1]) > FORMAT:
        raise NewerStore(key, int(head[1]), FORMAT)
    try:
        record: Record = _ADAPTERS[kind].validate_json(b"{" + content[head.end() :])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise DamagedStore(
            f"{key} in the shared store is damaged: {where}: {first['msg']}"
        ) from None
    return record
