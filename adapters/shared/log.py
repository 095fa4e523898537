"""One log of changes in a shared store: the order in which every replica applies them.

    log/000000000017.json       an entry; written once, by a conditional create
    snapshots/000000000100.json the state after entry 100, so that a start reads it and a short tail
    cluster.json                the format and the backbone

Creating the next number is the compare-and-swap: of several writers one succeeds, and whoever reads
on knows that nothing came in between. Numbers have no gaps, so that a reader needs no listing: the
first number that does not exist is the end. A collected entry leaves a mark in its place
(`adapters.shared.collect`): a writer or a reader who slept for a week finds it, and not a free
number in the middle of the past.
"""

import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from adapters.errors import (
    CollectedEntries,
    DamagedStore,
    OtherBackbone,
    StoreDenied,
    StoreFull,
    StoreUnreachable,
    UnknownOutcome,
)
from adapters.format.spec import BackboneIdentity
from adapters.shared.objects import ObjectStore
from adapters.shared.records import (
    COLLECTED,
    Cluster,
    Entry,
    LogState,
    NameRecord,
    ReplicaState,
    apply,
    decode,
    encode,
)

_CLUSTER = "cluster.json"
# How many entries are read at the same time: one is asked for first, since mostly there is none.
_WINDOWS = (1, 8, 32)
# Between tries to learn what became of a write.
_PAUSES = (0.02, 0.1, 0.3, 1.0)
# A snapshot may be collected while it is loaded; the next try finds a newer one.
_LOADS = 5


class SharedLog:
    """Blocking and safe to use from many threads. Every method raises StoreUnreachable and
    StoreDenied as `ObjectStore` does, NewerStore if it meets what a newer version wrote, and
    DamagedStore if it meets what nobody wrote; then nothing of it is returned.

    Args:
        patience: seconds for which `append` tries to learn what became of its entry; None: the
            store's timeout.
    """

    def __init__(self, store: ObjectStore, *, patience: float | None = None) -> None:
        self.store = store
        self.patience = store.timeout if patience is None else patience
        self._lock = threading.Lock()
        # What `load` and `read` have seen so far, for the next snapshot.
        self._state = LogState()
        self._snapshot = 0

    def open(self, backbone: BackboneIdentity) -> Cluster:
        """Check that the store belongs to replicas of this backbone, or begin a new one.

        Raises:
            OtherBackbone: it belongs to replicas of another backbone.
            StoreFailed: it does not support conditional writes.
        """
        self.store.check_conditional()
        content = self.store.get(_CLUSTER)
        if content is None:
            self.store.create(_CLUSTER, encode(Cluster(secrets.token_hex(16), backbone)))
            # Another replica may have been first.
            content = self.store.get(_CLUSTER)
        if content is None:
            raise StoreUnreachable(f"the adapter store {self.store.url} lost {_CLUSTER}")
        cluster = decode(Cluster, _CLUSTER, content)
        if cluster.backbone.fingerprint != backbone.fingerprint:
            raise OtherBackbone(
                f"the adapter store {self.store.url} belongs to replicas of the backbone "
                f"{cluster.backbone.name} ({cluster.backbone.fingerprint[:12]}); this one has "
                f"{backbone.name} ({backbone.fingerprint[:12]}): give it a prefix of its own"
            )
        return cluster

    def load(self) -> tuple[int, dict[str, NameRecord]]:
        """The last entry's number and every name's record: the newest snapshot and what follows."""
        for _ in range(_LOADS):
            state, snapshot = self.newest_snapshot()
            try:
                for entry in self._entries(state.number):
                    apply(state, entry)
                    state = replace(state, number=entry.number)
            except CollectedEntries:
                continue
            with self._lock:
                if state.number >= self._state.number:
                    self._state, self._snapshot = state, max(self._snapshot, snapshot)
            return state.number, dict(state.names)
        raise StoreUnreachable(f"the adapter store {self.store.url} is collected while it is read")

    def read(self, after: int) -> list[Entry]:
        """All entries after this number, in order; none at the log's end.

        The end that this saw was the end at some moment after the call began.

        Raises:
            CollectedEntries: the next entries are no longer there; `load` instead.
        """
        entries = list(self._entries(after))
        with self._lock:
            for entry in entries:
                if entry.number == self._state.number + 1:
                    apply(self._state, entry)
                    self._state = replace(self._state, number=entry.number)
        return entries

    def pending(self) -> dict[str, Entry]:
        """The prepares that `load` and `read` have seen neither committed nor aborted, by their
        change."""
        with self._lock:
            return dict(self._state.pending)

    def append(self, entry: Entry) -> bool:
        """Write the next entry; False: another one has this number.

        It may be called again with the same entry.

        Raises:
            UnknownOutcome: the store failed, and whether the entry was written is not known.
            StoreDenied, StoreFull: it was not written.
        """
        key, content = entry_key(entry.number), encode(entry)
        until = time.monotonic() + self.patience
        failure: StoreUnreachable | None = None
        for pause in _pauses():
            try:
                if self.store.create(key, content):
                    return True
                # Somebody's, or ours: a connection that broke after the store had done it.
                found = self.store.get(key)
            except (StoreDenied, StoreFull):
                # If an earlier try may have written it, its outcome stays unknown.
                if failure is None:
                    raise
                found = None
            except StoreUnreachable as error:
                failure, found = error, None
            if found == COLLECTED:
                # Far in the past: what was there is not known any more.
                break
            if found is not None:
                return found == content
            if time.monotonic() > until:
                break
            time.sleep(pause)
        raise UnknownOutcome(
            f"whether change {entry.change} of adapter {entry.name!r} is in the log is not known: "
            f"{failure or 'its place was collected'}"
        ) from failure

    def states(self) -> list[ReplicaState]:
        """What every replica last wrote, also those that are gone."""
        keys = self.store.list("replicas/")
        contents = zip(keys, self.store.get_all(keys), strict=True)
        return [decode(ReplicaState, key, content) for key, content in contents if content]

    def write_state(self, state: ReplicaState) -> None:
        """Replace a replica's own state."""
        self.store.put(state_key(state.id), encode(state))

    def remove_state(self, replica: str) -> None:
        """Forget a replica that is gone."""
        self.store.delete(state_key(replica))

    def write_snapshot(self, *, every: int = 100) -> int | None:
        """Write a snapshot of what this log has seen, if the last one is `every` entries behind.

        Returns its number, or None. Several replicas may do so at once: they write the same.
        """
        with self._lock:
            if self._state.number - self._snapshot < every:
                return None
            # Encoding many names takes a while, and who reads the log must not wait for it.
            number = self._state.number
            seen = replace(
                self._state, names=dict(self._state.names), pending=dict(self._state.pending)
            )
        self.store.create(snapshot_key(number), encode(seen))
        with self._lock:
            self._snapshot = max(self._snapshot, number)
        return number

    def entries_collected(self, number: int) -> None:
        """Let the next snapshots say that the entries up to this one were collected."""
        with self._lock:
            collected = max(number, self._state.collected)
            self._state = replace(self._state, collected=collected)

    def newest_snapshot(self) -> tuple[LogState, int]:
        """A state to go on from, and its number; an empty one if there is no snapshot."""
        for item in sorted(self.store.listing("snapshots/"), reverse=True):
            content = self.store.get(item.key, size=item.size)
            # Else it was collected since.
            if content is not None:
                state = decode(LogState, item.key, content)
                return state, state.number
        return LogState(), 0

    def _entries(self, after: int) -> Iterator[Entry]:
        """The entries after a number, up to the end.

        Raises:
            CollectedEntries: as `read`.
        """
        number, turn = after + 1, 0
        while True:
            window = _WINDOWS[min(turn, len(_WINDOWS) - 1)]
            keys = [entry_key(each) for each in range(number, number + window)]
            for key, content in zip(keys, self.store.get_all(keys), strict=True):
                if content is None:
                    return
                yield self._decoded(key, number, content)
                number += 1
            turn += 1

    def _decoded(self, key: str, number: int, content: bytes) -> Entry:
        if content == COLLECTED:
            raise CollectedEntries(
                f"entry {number} of the log in {self.store.url} was collected: load a snapshot"
            )
        entry = decode(Entry, key, content)
        if entry.number != number:
            raise DamagedStore(
                f"{key} in the shared store is damaged: its number is {entry.number}"
            )
        return entry


def entry_key(number: int) -> str:
    """Where an entry is."""
    return f"log/{number:012}.json"


def snapshot_key(number: int) -> str:
    """Where the state after an entry is."""
    return f"snapshots/{number:012}.json"


def state_key(replica: str) -> str:
    """Where a replica's own state is."""
    return f"replicas/{replica}.json"


def _pauses() -> Iterator[float]:
    yield from _PAUSES
    while True:
        yield _PAUSES[-1]
