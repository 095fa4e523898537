"""One service for each store: the lock says which, and ends with its process."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from adapters.errors import StoreInUse
from adapters.format.ownership import StoreLock


def test_a_second_owner_is_refused_and_told_which_process_it_is(tmp_path: Path) -> None:
    first, second = (StoreLock(tmp_path, "engine") for _ in range(2))
    first.acquire()
    with pytest.raises(StoreInUse, match=rf"\(process {os.getpid()}\) uses the folder"):
        second.acquire()
    # The other kind is another lock.
    StoreLock(tmp_path, "service").acquire()
    first.release()
    first.release()
    second.acquire()
    assert second.is_held()
    assert not first.is_held()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        StoreLock(tmp_path, "engine").acquire()
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    lock = StoreLock(tmp_path, "engine")
    with pytest.raises(StoreInUse, match=str(child)):
        lock.acquire()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock.acquire()
    for descriptor in (reading, writing):
        os.close(descriptor)


def test_a_new_owner_waits_for_the_old_one_to_end(tmp_path: Path) -> None:
    first, second = (StoreLock(tmp_path, "engine") for _ in range(2))
    first.acquire()
    timer = threading.Timer(0.2, first.release)
    timer.start()
    started = time.monotonic()
    second.acquire(wait_seconds=10)
    assert 0.1 < time.monotonic() - started < 5
    timer.join()


def test_a_lock_whose_folder_was_replaced_is_not_held(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    lock = StoreLock(root, "engine")
    lock.acquire()
    root.rename(tmp_path / "away")
    assert not lock.is_held()
    root.mkdir()
    assert not lock.is_held()
    lock.acquire()
    assert lock.is_held()
