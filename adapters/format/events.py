"""What became of a name's revisions, when, and who did it. For people: nothing depends on it.

The store keeps them beside the revisions (`AdapterStore.set_events`), a shared store in the name's
record. They go with the name; the audit log has them for longer, and all else that happened.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias, get_args

Happening: TypeAlias = Literal["publish", "stage", "promote", "rollback", "delete_revision"]

# Older ones are kept only where they say how a stored revision came.
MOST_EVENTS = 20
_HAPPENINGS = get_args(Happening)
_ARRIVALS = frozenset({"publish", "stage"})


@dataclass(frozen=True, slots=True)
class Event:
    """at: ISO 8601 in UTC. who: the name of a key; empty if none was needed, or if the service did
    it by itself."""

    at: str
    what: Happening
    revision: str
    who: str = ""


def with_event(events: Sequence[Event], event: Event, stored: Collection[str]) -> tuple[Event, ...]:
    """The events with one more, the newest first.

    Args:
        stored: the revisions that the name has now.
    """
    every = (event, *events)
    arrivals = {arrival(every, revision) for revision in stored}
    return (*every[:MOST_EVENTS], *(item for item in every[MOST_EVENTS:] if item in arrivals))


def arrival(events: Sequence[Event], revision: str) -> Event | None:
    """How a revision came, the last time."""
    arrivals = (item for item in events if item.what in _ARRIVALS and item.revision == revision)
    return next(arrivals, None)


def to_json(events: Sequence[Event]) -> bytes:
    return json.dumps([asdict(event) for event in events]).encode()


def from_json(content: bytes) -> tuple[Event, ...]:
    """
    Raises:
        ValueError: it is not what `to_json` writes.
    """
    try:
        items = json.loads(content)
        if not isinstance(items, list):
            raise TypeError("not a list")
        known = [field.name for field in fields(Event)]
        events = tuple(Event(**{name: str(item[name]) for name in known}) for item in items)  # type: ignore[arg-type]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a list of events: {error!r}") from None
    if unknown := {event.what for event in events} - set(_HAPPENINGS):
        raise ValueError(f"unknown events: {sorted(unknown)}")
    return events
