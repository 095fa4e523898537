"""Writers that are killed or fail: a reader always finds the store's old state or the new one."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from adapters.format import durable
from adapters.format import store as store_module
from adapters.format.store import AdapterStore

A, B, C = (letter * 1000 for letter in (b"a", b"b", b"c"))
REV_A, REV_B, REV_C = (sha256(data).hexdigest() for data in (A, B, C))

State = dict[str, list[str]]


def history(store: AdapterStore, name: str) -> list[str]:
    return [item.revision for item in store.revisions(name)]


def state(root: Path) -> State:
    """What a new reader sees; fails unless every revision can be read."""
    store = AdapterStore(root)
    seen = {name: history(store, name) for name in store.names()}
    for name, revisions in seen.items():
        assert store.current(name) == revisions[0]
        for revision in revisions:
            store.read(name, revision)
    return seen


# A forked child is killed before every line of the store and of the writing functions in turn, and
# the test looks at what it left. A power failure may also lose pages; the order of the syncs
# prevents that and has a test of its own.

Action = Callable[[AdapterStore], object]

ACTIONS: dict[str, tuple[Action, State]] = {
    "put a new name": (lambda s: s.put("new", B), {"spam": [REV_B, REV_A], "new": [REV_B]}),
    "put a new revision": (lambda s: s.put("spam", C), {"spam": [REV_C, REV_B, REV_A]}),
    "put an old revision": (lambda s: s.put("spam", A), {"spam": [REV_A, REV_B]}),
    "roll back": (lambda s: s.rollback("spam"), {"spam": [REV_A, REV_B]}),
    "delete": (lambda s: s.delete("spam"), {}),
}
BEFORE: State = {"spam": [REV_B, REV_A]}


def filled(root: Path) -> AdapterStore:
    store = AdapterStore(root)
    store.put("spam", A)
    store.put("spam", B)
    return store


def killed_before_line(number: int, store: AdapterStore, action: Action) -> bool:
    """Run the action in a child, killed before its `number`-th line; False if it finished."""
    child = os.fork()
    if child == 0:
        lines = 0
        watched = {store_module.__file__, durable.__file__}

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename not in watched:
                return None
            if event == "line":
                lines += 1
                if lines == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            action(store)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIONS)
def test_a_kill_at_any_line_leaves_the_old_state_or_the_new_one(name: str, tmp_path: Path) -> None:
    action, after = ACTIONS[name]
    seen = []
    filled(tmp_path / "before")
    for number in range(1, 400):
        root = Path(shutil.copytree(tmp_path / "before", tmp_path / str(number)))
        if not killed_before_line(number, AdapterStore(root), action):
            break
        seen.append(state(root))
        assert seen[-1] in (BEFORE, after)
        # The store is not only readable: the same action still works.
        if seen[-1] == BEFORE:
            action(AdapterStore(root))
        assert state(root) == after
    else:
        pytest.fail("the action never ended")
    assert state(root) == after
    assert BEFORE in seen
    assert after in seen
    assert len(seen) > 20


class Disk:
    """Real calls of `os`, one of which fails."""

    def __init__(self, fails: int) -> None:
        self.left = fails
        self.calls: list[str] = []

    @contextmanager
    def attached(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name in ("open", "mkdir", "fsync", "chmod", "replace", "rename", "close"):
                patch.setattr(os, name, self._wrapped(name))
            yield

    def _wrapped(self, name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            self.calls.append(name)
            self.left -= 1
            if self.left == 0 and name != "close":
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIONS)
def test_a_disk_that_fails_at_any_call_leaves_the_old_state_or_the_new_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action, after = ACTIONS[name]
    failures = 0
    for number in range(1, 100):
        root = tmp_path / str(number)
        store = filled(root)
        disk = Disk(number)
        try:
            with disk.attached(monkeypatch):
                action(store)
        except OSError:
            failures += 1
            assert state(root) in (BEFORE, after)
        else:
            assert state(root) == after
        if disk.left > 0:
            break
        if state(root) == BEFORE:
            action(store)
            assert state(root) == after
    assert disk.left > 0
    assert failures >= 4


def test_bytes_are_synced_before_a_name_refers_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path)
    disk = Disk(fails=-1)
    with disk.attached(monkeypatch):
        store.put("spam", A)
    durable = [call for call in disk.calls if call in ("mkdir", "fsync", "replace")]
    folder = ["mkdir", "fsync"]
    file = ["fsync", "replace", "fsync"]
    assert durable == folder + file + file
