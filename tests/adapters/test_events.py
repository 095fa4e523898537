"""Who did what to a name's revisions: bounded, and read back strictly."""

import pytest

from adapters.format.events import MOST_EVENTS, Event, arrival, from_json, to_json, with_event


def event(what: str, revision: str, at: int = 0) -> Event:
    return Event(f"{at:03}", what, revision, "ann")  # type: ignore[arg-type]


def test_the_newest_come_first_and_arrivals_of_stored_revisions_stay() -> None:
    events: tuple[Event, ...] = ()
    for at, revision in enumerate("abc"):
        events = with_event(events, event("publish", revision, at), {"a", "b", "c"})
    for at in range(40):
        events = with_event(events, event("rollback", "ab"[at % 2], 10 + at), {"a", "b"})
    assert [item.at for item in events] == sorted((item.at for item in events), reverse=True)
    assert len(events) == MOST_EVENTS + 2
    # `c` was removed meanwhile: how it came is of no interest any more.
    assert [item.revision for item in events if item.what == "publish"] == ["b", "a"]


def test_a_revision_that_came_twice_is_told_by_the_last_time() -> None:
    events = (event("rollback", "a", 3), event("publish", "a", 2), event("stage", "a", 1))
    found = arrival(events, "a")
    assert found is not None
    assert found.at == "002"
    assert arrival(events, "b") is None


def test_what_is_written_is_read_back() -> None:
    events = (event("stage", "a", 1), event("promote", "a", 2))
    assert from_json(to_json(events)) == events
    assert from_json(to_json(())) == ()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}x", b"3", b"{}", b"[3]", b"[{}]", b'[{"at":"","what":"eat","revision":"","who":""}]'],
)
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        from_json(content)
