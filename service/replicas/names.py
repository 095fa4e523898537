"""What changes make of a name's record. Pure functions: the committer calls them again whenever
somebody else's change came first.
"""

from collections.abc import Collection
from dataclasses import replace

from adapters.shared.records import NameRecord, RevisionRecord


def published(
    record: NameRecord | None,
    revision: RevisionRecord,
    *,
    kept: int | None = None,
    spare: Collection[str] = (),
) -> NameRecord:
    """The record once this revision is current.

    Args:
        kept: how many revisions stay; None: all.
        spare: revisions that stay whatever their number.
    """
    if record is None:
        return NameRecord((revision,))
    known = {item.revision: item for item in record.revisions}
    # One that is published again keeps its time, as a file in a folder does.
    first = known.pop(revision.revision, revision)
    listed = [first, *known.values()]
    beyond = listed[kept:] if kept is not None else []
    dropped = {item.revision for item in beyond if item.revision not in spare}
    return replace(record, revisions=tuple(item for item in listed if item.revision not in dropped))


def staged(
    record: NameRecord,
    revision: RevisionRecord,
    *,
    kept: int | None = None,
    spare: Collection[str] = (),
) -> NameRecord:
    """The record once it has this revision as its last one; arguments as of `published`."""
    if any(item.revision == revision.revision for item in record.revisions):
        return record
    # Beside a staged revision, the current one stays at least.
    beyond = [] if kept is None else record.revisions[max(1, kept - 1) :]
    dropped = {item.revision for item in beyond if item.revision not in spare}
    stay = [item for item in record.revisions if item.revision not in dropped]
    return replace(record, revisions=(*stay, revision))


def rolled_back(record: NameRecord, revision: str) -> NameRecord:
    """The record once a revision that it has is current."""
    first = [item for item in record.revisions if item.revision == revision]
    others = [item for item in record.revisions if item.revision != revision]
    assert first, "the catalog resolves the revision"
    return replace(record, revisions=(*first, *others))


def without(record: NameRecord, revision: str) -> NameRecord:
    """The record once a revision that is not the current one was deleted."""
    return replace(
        record, revisions=tuple(item for item in record.revisions if item.revision != revision)
    )
