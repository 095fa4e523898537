"""One adapter name as it is served, and changes to it as values.

A refusal is stored and raised again for every request that asks for the adapter. Its traceback is
dropped each time, because it would grow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from adapters.errors import (
    AdapterError,
    IncompatibleAdapter,
    RevisionConflict,
    UnknownRevision,
    UnloadedAdapter,
)
from adapters.format.events import Event
from adapters.format.spec import AdapterSpec
from adapters.format.store import Revision
from adapters.format.uploads import ReceivedFile
from service.catalog.traffic import Ending, Figures, Traffic
from service.client.types import AdapterState
from service.engine.interface import AdapterKey


@dataclass(frozen=True, slots=True)
class Condition:
    """Which revision must be current for a change to happen. None: no condition.

    match: one of these revisions; "*" is any. none_match: none of these; "*": the name is new.
    """

    match: frozenset[str] | None = None
    none_match: frozenset[str] | None = None

    def check(self, name: str, current: str | None) -> None:
        """
        Raises:
            RevisionConflict: it does not hold.
        """
        if self.match is not None and (current is None or not self.match & {current, "*"}):
            raise RevisionConflict(name, " or ".join(sorted(self.match)), current)
        if self.none_match is not None and current is not None and self.none_match & {current, "*"}:
            raise RevisionConflict(name, "none of " + " or ".join(sorted(self.none_match)), current)


class Origin(NamedTuple):
    """Who asks for a change. client: the name of its key, empty without one. request_id: "-" for
    what the service does by itself. address: of the other end of the connection, if known."""

    client: str = ""
    request_id: str = "-"
    address: str = ""


# The service itself.
ITSELF = Origin()

Operation = Literal[
    "publish",
    "rollback",
    "delete",
    "delete_revision",
    "unload",
    "reload",
    "rehash",
    "settle",
    "divide",
    "end_traffic",
    "figures",
    "card",
    "describe",
]


# Of a model card. Those that `fit` writes have 5,000 to 15,000.
MAX_CARD_BYTES = 2**18

# What a change waits for where several replicas share a store: nothing but that it is decided, this
# replica, or all of them.
Wait = Literal["none", "one", "all"]


@dataclass(frozen=True, slots=True)
class Change:
    """What is to happen to a name; `CatalogView` has a method for each operation.

    revision: for rollback, rehash and delete_revision, a prefix of it. file: for publish, received
    beside the store. force: publish also what means something else than the current revision.
    stage: publish without making it current. traffic: for divide; its revision may be a prefix.
    ending: for end_traffic, which ends only a division to `revision`, if there is one. wait: a
    service that is not a replica always waits for all. card: for describe. client, request_id,
    address: as in `Origin`.
    """

    operation: Operation
    name: str
    condition: Condition = Condition()
    revision: str | None = None
    file: ReceivedFile | None = None
    force: bool = False
    stage: bool = False
    traffic: Traffic | None = None
    ending: Ending | None = None
    wait: Wait = "all"
    card: str | None = None
    client: str = ""
    request_id: str = "-"
    address: str = ""


class ChangeResult(NamedTuple):
    """revision: the one served now, or that was deleted or staged alone; empty after what has none.
    created: the name is new. changed: another revision is current now. figures, card: for the
    operations of their names, if there are any."""

    revision: str = ""
    created: bool = False
    changed: bool = False
    figures: Figures | None = None
    card: str | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What came of looking at a file as if it were to be published.

    spec: what it declares, if that can be read. refusal: why it would be refused; None: it would
    not.
    """

    spec: AdapterSpec | None
    refusal: AdapterError | None = None


class Split(NamedTuple):
    """The second revision of a name whose texts are divided, and how they are."""

    traffic: Traffic
    key: AdapterKey
    spec: AdapterSpec


class Resolved(NamedTuple):
    """An adapter that can be asked for predictions. split: set while the texts of its name are
    divided between this revision and another one."""

    key: AdapterKey
    spec: AdapterSpec
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One name, as the store has it.

    current: None if the store cannot tell. revisions: those whose files exist, the current one
    first. specs and unusable: by revision; a revision may be in both, or only in the latter.
    refusal: why the current revision cannot be served. traffic: how texts are divided between the
    current revision and another one, or were divided last; None: they never were. events: what
    became of the revisions, the newest first.
    """

    name: str
    current: str | None
    revisions: tuple[Revision, ...] = ()
    specs: Mapping[str, AdapterSpec] = field(default_factory=dict)
    unusable: Mapping[str, AdapterError] = field(default_factory=dict)
    refusal: AdapterError | None = None
    traffic: Traffic | None = None
    events: tuple[Event, ...] = ()

    @property
    def spec(self) -> AdapterSpec | None:
        """What the current file declares, if it can be read."""
        return None if self.current is None else self.specs.get(self.current)

    @property
    def served(self) -> frozenset[str]:
        """The revisions that can be asked for predictions."""
        return frozenset(self.specs.keys() - self.unusable.keys())

    @property
    def answering(self) -> dict[str, AdapterSpec]:
        """The revisions that answer texts for the name alone: the current one, and one that is
        tried beside it; none if the current one cannot be served."""
        if self.current is None or self.spec is None or self.refusal is not None:
            return {}
        tried = {} if (split := self.split) is None else {split.key.revision: split.spec}
        return {self.current: self.spec, **tried}

    @property
    def split(self) -> Split | None:
        """The second revision, while texts are divided and both can be served."""
        traffic = self.traffic
        if traffic is None or not traffic.in_force or self.refusal is not None:
            return None
        spec = self.specs.get(traffic.revision)
        if spec is None or traffic.revision in self.unusable or traffic.baseline != self.current:
            return None
        return Split(traffic, AdapterKey(self.name, traffic.revision), spec)

    def settled(self) -> "CatalogEntry":
        """The entry with its division ended, if the revisions that are left have ended it."""
        traffic = self.traffic
        if traffic is None or not traffic.in_force:
            return self
        if self.current == traffic.revision:
            ended = traffic.end("promoted", "its revision is the current one")
        elif self.current != traffic.baseline:
            to = "unknown" if self.current is None else self.current[:12]
            ended = traffic.end("replaced", f"the current revision is another one now: {to}")
        elif self.refusal is not None:
            ended = traffic.end("unusable", f"the current revision is not served: {self.refusal}")
        elif (reason := self.unusable.get(traffic.revision)) is not None:
            ended = traffic.end("unusable", f"its revision cannot be served: {reason}")
        elif traffic.revision not in self.specs:
            ended = traffic.end("unusable", "its revision is not stored any more")
        else:
            return self
        return replace(self, traffic=ended)

    @property
    def state(self) -> AdapterState:
        match self.refusal:
            case None:
                return "ready"
            case IncompatibleAdapter():
                return "incompatible"
            case UnloadedAdapter():
                return "unloaded"
            case _:
                return "damaged"

    @property
    def size(self) -> int | None:
        """Bytes of the current file."""
        return next((item.size for item in self.revisions if item.revision == self.current), None)

    @property
    def labels(self) -> list[str]:
        """Union over usable revisions: a request may pin an old one. Unloading removes none."""
        usable = (
            spec
            for key, spec in self.specs.items()
            if isinstance(self.unusable.get(key), UnloadedAdapter | None)
        )
        return list(dict.fromkeys(label for spec in usable for label in spec.labels))

    def unloaded(self) -> "CatalogEntry":
        """The entry with no revision served; unusable revisions keep their reason."""
        refusal = UnloadedAdapter(self.name)
        return replace(
            self,
            unusable={**dict.fromkeys(self.specs, refusal), **self.unusable},
            refusal=self.refusal or refusal,
        )

    def damaged(self, revision: str, damage: AdapterError) -> "CatalogEntry":
        """The entry with one revision no longer served."""
        refusal = damage if revision == self.current else self.refusal
        return replace(self, unusable={**self.unusable, revision: damage}, refusal=refusal)

    def without(self, revision: str) -> "CatalogEntry":
        """The entry once one revision, not the current one, was deleted."""
        return replace(
            self,
            revisions=tuple(item for item in self.revisions if item.revision != revision),
            specs={key: spec for key, spec in self.specs.items() if key != revision},
            unusable={key: error for key, error in self.unusable.items() if key != revision},
        )

    def revision(self, prefix: str) -> str:
        """The one stored revision that starts with `prefix`.

        Raises:
            UnknownRevision: none or several match.
        """
        known = list(dict.fromkeys([*self.specs, *self.unusable]))
        matches = [item for item in known if prefix and item.startswith(prefix)]
        if len(matches) != 1:
            raise UnknownRevision(self.name, prefix, known)
        return matches[0]

    def resolved(self, revision: str) -> Resolved:
        """
        Raises:
            IncompatibleAdapter, DamagedFile: it cannot be served here.
            UnloadedAdapter: it was unloaded.
        """
        if (refusal := self.unusable.get(revision)) is not None:
            raise refusal.with_traceback(None)
        return Resolved(AdapterKey(self.name, revision), self.specs[revision])

    def readable(self, revision: str) -> AdapterSpec:
        """What a stored revision declares, also if it cannot be served.

        Raises:
            DamagedFile: its file cannot be read.
        """
        spec = self.specs.get(revision)
        if spec is None:
            raise self.unusable[revision].with_traceback(None)
        return spec

    def previous(self) -> str:
        """The revision that was current before this one; a staged one never was.

        Raises:
            UnknownRevision: there is none.
        """
        traffic = self.traffic
        staged = traffic.revision if traffic is not None and traffic.never_current else None
        for item in self.revisions:
            if item.revision not in (self.current, staged):
                return item.revision
        raise UnknownRevision(self.name, None, [self.current] if self.current else [])

    def require_current(self) -> str:
        """
        Raises:
            DamagedFile: the store cannot tell the current revision.
        """
        if self.current is None:
            assert self.refusal is not None, "an adapter without a current revision says why"
            raise self.refusal.with_traceback(None)
        return self.current
