"""What changes make of a name's record."""

from datetime import UTC, datetime

from adapters.shared.records import NameRecord, RevisionRecord
from service.replicas.names import published, rolled_back, without


def revision(letter: str) -> RevisionRecord:
    return RevisionRecord(letter * 64, 1, datetime(2026, 1, 1, tzinfo=UTC), "{}")


def record(letters: str, traffic: dict[str, str] | None = None) -> NameRecord:
    return NameRecord(tuple(map(revision, letters)), traffic)


def letters_of(record: NameRecord) -> str:
    return "".join(item.revision[0] for item in record.revisions)


def test_a_published_revision_comes_first_and_the_oldest_go() -> None:
    assert letters_of(published(None, revision("a"))) == "a"
    assert letters_of(published(record("ab"), revision("c"))) == "cab"
    assert letters_of(published(record("abc"), revision("d"), kept=3)) == "dab"
    assert letters_of(published(record("abc"), revision("d"), kept=1, spare={"b" * 64})) == "db"
    assert letters_of(published(record("abc"), revision("c"), kept=1)) == "c"


def test_a_revision_that_is_published_again_is_there_once() -> None:
    assert letters_of(published(record("abc"), revision("b"))) == "bac"


def test_rolling_back_brings_a_revision_to_the_front() -> None:
    assert letters_of(rolled_back(record("abc"), "b" * 64)) == "bac"
    assert letters_of(rolled_back(record("abc"), "a" * 64)) == "abc"


def test_a_revision_can_be_left_out() -> None:
    assert letters_of(without(record("abc"), "b" * 64)) == "ac"


def test_changes_keep_how_traffic_is_divided() -> None:
    divided = record("ab", {"revision": "b"})
    for after in (published(divided, revision("c")), rolled_back(divided, "b" * 64)):
        assert after.traffic == divided.traffic
