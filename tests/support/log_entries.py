"""Entries of the shared log, with as little in them as they need."""

import itertools
from datetime import UTC, datetime
from hashlib import sha256

from adapters.format.spec import BackboneIdentity
from adapters.shared.records import Entry, Kind, NameRecord, RevisionRecord

BACKBONE = BackboneIdentity(name="tiny", fingerprint="a" * 64)
OTHER_BACKBONE = BackboneIdentity(name="other", fingerprint="b" * 64)

_WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_changes = itertools.count()


def revision_of(content: bytes) -> str:
    return sha256(content).hexdigest()


def record(*contents: bytes, spec: str = "{}") -> NameRecord:
    """A name whose revisions have these bytes, the current one first."""
    return NameRecord(
        tuple(RevisionRecord(revision_of(each), len(each), _WHEN, spec) for each in contents)
    )


def entry(
    number: int,
    name: str = "spam",
    state: NameRecord | None = None,
    *,
    kind: Kind = "commit",
    change: str | None = None,
    by: str = "one",
) -> Entry:
    """An entry of a change of its own, unless its id is given."""
    change = change or f"change-{next(_changes)}"
    operation = "delete" if state is None else "publish"
    return Entry(number, kind, change, name, operation, state, by, _WHEN.isoformat())
