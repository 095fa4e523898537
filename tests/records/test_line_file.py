"""Files of lines: whole lines of many processes in order, rotated, and old ones removed."""

import os
import resource
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.records.line_file import LineFile


def line_file(
    path: Path, *, max_bytes: int = 10**6, kept: int = 3, days: int | None = None
) -> LineFile:
    return LineFile(path, max_bytes=max_bytes, kept=kept, days=days)


def rotated(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.2*"))


def test_a_new_file_is_its_owners_alone_and_an_old_one_keeps_its_mode(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    line_file(path).append(b"one\n", sync=True)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    line_file(path).append(b"two\n", sync=False)
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_folder_is_made_but_not_the_one_above_it(tmp_path: Path) -> None:
    line_file(tmp_path / "new" / "log").append(b"one\n", sync=True)
    with pytest.raises(FileNotFoundError):
        line_file(tmp_path / "gone" / "new" / "log").append(b"one\n", sync=True)
    assert not (tmp_path / "gone").exists()


def test_a_file_is_rotated_by_size_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = line_file(path, max_bytes=25, kept=2)
    for number in range(10):
        file.append(b"line %05d\n" % number, sync=False)
    assert [item.read_bytes() for item in rotated(path)] == [
        b"line 00004\nline 00005\n",
        b"line 00006\nline 00007\n",
    ]
    assert path.read_bytes() == b"line 00008\nline 00009\n"
    file.append(b"x" * 100 + b"\n", sync=False)
    assert path.read_bytes() == b"x" * 100 + b"\n"


def record(age: timedelta) -> bytes:
    return b'{"time":"%s"}\n' % (datetime.now(UTC) - age).isoformat().encode()


def written(path: Path, age: timedelta) -> None:
    """As if the file had been written so long ago."""
    when = time.time() - age.total_seconds()
    os.utime(path, (when, when))


def test_a_file_is_rotated_after_a_day_and_removed_after_its_days(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = line_file(path, days=7)
    file.append(record(timedelta(hours=23)), sync=False)
    file.append(record(timedelta(0)), sync=False)
    assert not rotated(path)
    path.write_bytes(record(timedelta(hours=25)))
    file.append(record(timedelta(0)), sync=False)
    (old,) = rotated(path)
    assert path.read_bytes().count(b"\n") == 1
    for days, left in ((6.9, [old]), (7.1, [])):
        written(old, timedelta(days=days))
        file.expire()
        assert rotated(path) == left
    assert path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize(("days", "left"), [(0.9, ["log"]), (1.1, ["log.2"]), (7.1, [])])
def test_a_file_that_nobody_appends_to_is_rotated_and_removed_too(
    tmp_path: Path, days: float, left: list[str]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(record(timedelta(days=days)))
    written(path, timedelta(days=days))
    line_file(path, days=7).expire()
    assert [item.name[:5] for item in tmp_path.iterdir()] == left


def test_what_is_not_there_yet_is_not_made_to_be_looked_at(tmp_path: Path) -> None:
    line_file(tmp_path / "new" / "log", days=7).expire()
    assert not (tmp_path / "new").exists()


def test_small_files_of_many_days_stay_until_they_are_too_old_or_too_large_together(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    for day in range(1, 41):
        old = path.with_name(f"log.{datetime.now(UTC) - timedelta(days=day):%Y%m%dT%H%M%S.%fZ}")
        old.write_bytes(record(timedelta(days=day)))
        written(old, timedelta(days=day - 0.1))
    line_file(path, days=30, kept=10).expire()
    assert len(rotated(path)) == 30
    newest = rotated(path)[-11:]
    line_file(path, days=30, kept=10, max_bytes=newest[0].stat().st_size).expire()
    assert rotated(path) == newest[1:]
    line_file(path, kept=0).expire()
    assert not rotated(path)


def test_after_a_clock_ran_ahead_files_are_rotated_and_removed_as_if_they_were_of_now(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    file = line_file(path, days=7)
    path.write_bytes(record(-timedelta(days=400)))
    written(path, -timedelta(days=400))
    file.append(record(timedelta(0)), sync=False)
    assert path.read_bytes().count(b"\n") == 1
    (old,) = rotated(path)
    assert abs(old.stat().st_mtime - time.time()) < 60


def test_lines_of_writers_that_are_seconds_apart_are_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = line_file(path, days=30)
    for ahead in (3, 0, 2, 1, 0):
        moment = (datetime.now(UTC) + timedelta(seconds=ahead)).isoformat(timespec="milliseconds")
        file.append(f'{{"time":"{moment}"}}\n'.encode(), sync=False)
    assert len(path.read_bytes().splitlines()) == 5
    assert not rotated(path)


def test_what_cannot_be_removed_keeps_no_line_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "unlink", refuse)
    path = tmp_path / "log"
    file = line_file(path, max_bytes=10, kept=1)
    for number in range(5):
        file.append(b"line %03d\n" % number, sync=False)
    assert path.read_bytes() == b"line 004\n"
    assert len(rotated(path)) == 4


def test_a_line_that_a_power_failure_cut_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"half')
    line_file(path).append(b"whole\n", sync=True)
    assert path.read_bytes() == b'{"half\nwhole\n'


def test_a_write_that_fails_midway_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    line_file(path).append(b"one\n", sync=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
            line_file(path).append(b"a longer line\n", sync=True)
        except OSError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_bytes() == b"one\n"


def test_lines_of_several_processes_are_all_there_and_whole(tmp_path: Path) -> None:
    path, children = tmp_path / "log", []
    for process in range(4):
        child = os.fork()
        if child == 0:
            try:
                file = line_file(path, max_bytes=2000, kept=1000)
                for number in range(100):
                    file.append(f"{process} {number} {'x' * 20}\n".encode(), sync=False)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    lines = [line for item in [*rotated(path), path] for line in item.read_text().splitlines()]
    assert len(lines) == 400
    for process in range(4):
        mine = [line for line in lines if line.startswith(f"{process} ")]
        assert mine == [f"{process} {number} {'x' * 20}" for number in range(100)]
