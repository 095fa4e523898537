"""The follower alone, on a log in a folder: what becomes of those who wait for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import CollectedEntries, StoreUnreachable
from adapters.shared.log import SharedLog
from adapters.shared.objects import ObjectStore
from adapters.shared.records import Entry, NameRecord
from service.engine.observer import Observer
from service.replicas.follower import Follower
from service.replicas.lease import Lease
from service.replicas.preparations import Preparations
from tests.support.log_entries import entry, record


class Stage:
    """A follower, and what it was told and has told."""

    def __init__(self, root: Path) -> None:
        self.log = SharedLog(ObjectStore(str(root)))
        self.ok: list[bool] = []
        self.prepared: list[str] = []
        self.expired: list[str] = []
        self.committed: list[int] = []
        self.restored: list[set[str]] = []
        self.preparations = Preparations(
            prepare=self._prepare, discard=_ignored, changed=self._changed, seconds=0.1
        )
        stage = self

        class Seen(Observer):
            def followed(self, seconds: float, held: bool, applied: int, ok: bool) -> None:  # noqa: ARG002
                stage.ok.append(ok)

        self.follower = Follower(
            self.log,
            "one",
            Lease(5.0),
            self.preparations,
            follow_seconds=0.02,
            observer=Seen(),
            open_log=lambda: None,
            commit=lambda entry: self.committed.append(entry.number),
            restore=self._restore,
            everywhere=_nothing,
            renewed=lambda: None,
            expired=lambda entry: self.expired.append(entry.change),
        )

    async def _prepare(self, entry: Entry) -> None:
        self.prepared.append(entry.change)

    async def _restore(self, names: Mapping[str, NameRecord]) -> None:
        self.restored.append(set(names))

    def append(self, *entries: Entry) -> None:
        for each in entries:
            assert self.log.append(each)

    def _changed(self) -> None:
        self.follower.changed()


async def _nothing(*_: Any) -> None:
    pass


def _ignored(_: Any) -> None:
    pass


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path / "shared")
    await stage.follower.start()
    yield stage
    await stage.follower.stop()


async def refused(waiting: Awaitable[None]) -> str:
    with pytest.raises(StoreUnreachable) as error:
        await asyncio.wait_for(waiting, 2)
    return str(error.value)


async def test_an_unexpected_error_is_told_to_those_who_wait_and_shown(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> list[Entry]:
        raise RuntimeError("can't start new thread")

    await stage.follower.caught_up()
    assert stage.ok[-1:] == [True]
    with monkeypatch.context() as broken:
        broken.setattr(stage.log, "read", failing)
        assert "can't start new thread" in await refused(stage.follower.caught_up())
        assert "can't start new thread" in (stage.follower.trouble or "")
        with pytest.raises(StoreUnreachable):
            await stage.follower.caught_up()
        assert not stage.ok[-1]
    await stage.follower.caught_up()
    assert stage.follower.trouble is None


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_those_who_wait_when_it_stops_are_told(stage: Stage, turns: int) -> None:
    waiting = asyncio.create_task(stage.follower.caught_up())
    for _ in range(turns):
        await asyncio.sleep(0)
    await stage.follower.stop()
    # What was on its way may have been read.
    with suppress(StoreUnreachable):
        await asyncio.wait_for(waiting, 2)
    assert "leaving" in await refused(stage.follower.caught_up())


async def test_whoever_catches_up_prepares_only_what_is_still_open(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> list[Entry]:
        raise StoreUnreachable("cut off")

    with monkeypatch.context() as broken:
        broken.setattr(stage.log, "read", failing)
        await refused(stage.follower.caught_up())
        stage.append(
            entry(1, "n", record(b"1"), kind="prepare", change="done"),
            entry(2, "n", record(b"1"), change="done"),
            entry(3, "n", record(b"2"), kind="prepare", change="given up"),
            entry(4, "n", record(b"2"), kind="abort", change="given up"),
            entry(5, "n", record(b"3"), kind="prepare", change="open"),
        )
    await stage.follower.caught_up()
    until_prepared = stage.preparations.done("open")
    await asyncio.wait_for(until_prepared, 2)
    assert (stage.prepared, stage.committed) == (["open"], [2])


async def test_a_start_without_the_store_loads_the_log_later_and_replays_nothing(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path / "shared")
    stage.append(*(entry(number, "n", record(b"%d" % number)) for number in range(1, 4)))
    stage.follower.start_later(StoreUnreachable("cut off"))
    await stage.follower.caught_up()
    assert (stage.restored, stage.committed, stage.follower.number) == ([{"n"}], [], 3)
    await stage.follower.stop()


async def test_a_replica_that_starts_takes_part_in_what_is_being_prepared_and_ends_what_is_not(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path / "shared")
    stage.append(
        entry(1, "n", record(b"1"), kind="prepare", change="done"),
        entry(2, "n", record(b"1"), change="done"),
        entry(3, "n", record(b"2"), kind="prepare", change="open"),
    )
    await stage.follower.start()
    assert "open" in stage.preparations
    await asyncio.wait_for(stage.preparations.done("open"), 2)
    await stage.follower.caught_up()
    assert [state.ready for state in stage.log.states()] == [("open",)]
    assert stage.prepared == ["open"]
    # Its committer is gone, as is every replica that had read this prepare.
    await asyncio.sleep(0.15)
    await stage.follower.caught_up()
    assert set(stage.expired) == {"open"}
    await stage.follower.stop()


async def test_what_was_settled_in_collected_entries_is_prepared_no_longer(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.append(entry(1, "n", record(b"1"), kind="prepare", change="x"))
    await stage.follower.caught_up()
    assert "x" in stage.preparations

    def collected(_: int) -> list[Entry]:
        raise CollectedEntries("entry 2")

    stage.append(entry(2, "n", record(b"1"), kind="abort", change="x"))
    monkeypatch.setattr(stage.log, "read", collected)
    await stage.follower.caught_up()
    assert "x" not in stage.preparations
    assert stage.follower.number == 2
