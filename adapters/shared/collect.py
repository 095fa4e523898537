"""Removes what nobody needs any more from a shared store: old entries, snapshots and objects.

What is removed was superseded for `grace_seconds` at least: a slow reader can finish, and an upload
may take as long before an entry refers to it. Ages are differences between the store's own times;
its "now" is the newest write that a listing shows, which replicas make all the time. No machine's
clock is compared with another's.

    entries     up to the newest snapshot that is older than the grace. A mark takes their place,
                which is never free again: a writer who slept through all this still finds its
                number taken, and a reader learns that it must load a snapshot.
    snapshots   those before that one.
    cards       of such revisions, by the same rule.
    unfinished  files of writers that were killed; such as exist in a folder.
    objects     to which neither that snapshot nor anything since refers, and which were not
                uploaded since.
"""

from dataclasses import dataclass
from time import monotonic

from adapters.errors import CollectedEntries
from adapters.shared.log import SharedLog, entry_key
from adapters.shared.objects import (
    GRACE_SECONDS,
    WINDOW_SECONDS,
    ObjectStore,
    card_key,
    object_key,
)
from adapters.shared.records import COLLECTED, LogState, decode

_REMOVED = ("objects/", "cards/", "probes/")


@dataclass(frozen=True, slots=True)
class Collected:
    """How many of each were removed. objects: and cards."""

    entries: int = 0
    snapshots: int = 0
    objects: int = 0


def collect(log: SharedLog, *, grace_seconds: float = GRACE_SECONDS) -> Collected:
    """Remove what was superseded for this long. Several replicas may do so at once.

    Raises:
        StoreFailed, NewerStore, DamagedStore: as `SharedLog`; the next call goes on.
    """
    # What is superseded on a quiet cluster, too, can go one grace from now.
    log.write_snapshot(every=1)
    store = log.store
    snapshots = sorted(store.listing("snapshots/"))
    # A replica that is killed as it starts leaves its probe.
    objects = [item for prefix in _REMOVED for item in store.listing(prefix)]
    written = [*snapshots, *objects, *store.listing("replicas/")]
    now = max((item.modified for item in written), default=0.0)
    store.remove_unfinished(now - grace_seconds)
    old = [item for item in snapshots if now - item.modified >= grace_seconds]
    content = store.get(old[-1].key, size=old[-1].size) if old else None
    # None: another replica collects, and is ahead.
    if content is None:
        return Collected()
    base = decode(LogState, old[-1].key, content)
    try:
        needed = _needed(log, base)
    except CollectedEntries:
        return Collected()
    removed = 0
    for item in objects:
        if item.key in needed or now - item.modified < grace_seconds:
            continue
        # The listing may be old by now, and the object new again: `objects.store_object`.
        looked = monotonic()
        found = store.stat(item.key)
        is_old = found is not None and now - found.modified >= grace_seconds
        if is_old and monotonic() - looked <= WINDOW_SECONDS:
            store.delete(item.key)
            removed += 1
    entries = _mark(store, base.collected, base.number)
    log.entries_collected(base.number)
    for item in old[:-1]:
        store.delete(item.key)
    return Collected(entries, len(old) - 1, removed)


def _needed(log: SharedLog, base: LogState) -> set[str]:
    """The keys of all objects and cards that were referred to at the base or later."""
    records = base.records()
    records += [(entry.name, entry.record) for entry in log.read(base.number)]
    return {
        key
        for name, record in records
        if record is not None
        for item in record.revisions
        for key in (object_key(item.revision), card_key(name, item.revision, item.stored))
    }


def _mark(store: ObjectStore, done: int, last: int) -> int:
    """Put marks in the place of the entries after `done`, up to `last`, in this order: where the
    last one is there, another replica has written them all."""
    if done >= last or store.get(entry_key(last)) == COLLECTED:
        return 0
    for number in range(done + 1, last + 1):
        store.put(entry_key(number), COLLECTED)
    return last - done
