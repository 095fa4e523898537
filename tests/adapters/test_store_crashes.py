"""Writers that are killed or fail: a reader always finds the store's old state or the new one."""

import inspect
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest

from adapters import faults
from adapters.errors import StoreFull
from adapters.format import durable, uploads
from adapters.format import store as store_module
from adapters.format.store import AdapterStore
from adapters.format.uploads import Upload

A, B, C = (letter * 1000 for letter in (b"a", b"b", b"c"))
REV_A, REV_B, REV_C = (sha256(data).hexdigest() for data in (A, B, C))

State = dict[str, list[str]]


def history(store: AdapterStore, name: str) -> list[str]:
    return [item.revision for item in store.revisions(name)]


def state(root: Path) -> State:
    """What a new reader sees; fails unless every revision can be read and nothing else is there."""
    store = AdapterStore(root)
    store.collect()
    seen = {name: history(store, name) for name in store.names()}
    for name, revisions in seen.items():
        assert store.current(name) == revisions[0]
        for revision in revisions:
            store.read(name, revision)
    files = {f"{name}/current" for name in seen}
    files |= {f"{name}/{revision}.safetensors" for name in seen for revision in seen[name]}
    files |= {f".locks/{name}" for name in seen}
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    # A name that was never locked since has no lock.
    assert files - {f".locks/{name}" for name in seen} <= left <= files
    folders = {path.name for path in root.iterdir()} - {".locks", ".uploads"}
    assert folders == set(seen)
    return seen


# A forked child is killed at every fault point of an action in turn, as they are passed, and the
# test looks at what it left. A power failure may also lose pages; the order of the syncs prevents
# that and has a test of its own.

Action = Callable[[AdapterStore], object]


def receive_and_put(store: AdapterStore) -> None:
    """As the service does: piece by piece, then moved into its place."""
    with Upload(store.root, announced=len(C)) as upload:
        for start in range(0, len(C), 400):
            upload.write(C[start : start + 400])
        store.put("spam", upload.finish())


ACTIONS: dict[str, tuple[Action, State]] = {
    "put a new name": (lambda s: s.put("new", B), {"spam": [REV_B, REV_A], "new": [REV_B]}),
    "put a new revision": (lambda s: s.put("spam", C), {"spam": [REV_C, REV_B, REV_A]}),
    "put an old revision": (lambda s: s.put("spam", A), {"spam": [REV_A, REV_B]}),
    "receive and put": (receive_and_put, {"spam": [REV_C, REV_B, REV_A]}),
    "put and prune": (
        lambda s: AdapterStore(s.root, kept=1).put("spam", C),
        {"spam": [REV_C]},
    ),
    "stage": (lambda s: s.stage("spam", C, expected=REV_B), {"spam": [REV_B, REV_A, REV_C]}),
    "roll back": (lambda s: s.rollback("spam"), {"spam": [REV_A, REV_B]}),
    "delete a revision": (lambda s: s.delete_revision("spam", REV_A), {"spam": [REV_B]}),
    "delete": (lambda s: s.delete("spam"), {}),
}
BEFORE: State = {"spam": [REV_B, REV_A]}


def filled(root: Path) -> AdapterStore:
    store = AdapterStore(root)
    store.put("spam", A)
    store.put("spam", B)
    return store


def in_child(work: Callable[[], object]) -> int:
    """Run this in a forked child; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@contextmanager
def handling(handler: faults.Handler) -> Iterator[None]:
    faults.install(handler)
    try:
        yield
    finally:
        faults.install(None)


def noting(passed: list[str]) -> faults.Handler:
    """A handler that only writes down which points are passed."""

    def note(name: str) -> bool:
        passed.append(name)
        return False

    return note


def points_of(store: AdapterStore, action: Action) -> list[str]:
    """The names of the fault points that an action passes, in order."""
    passed: list[str] = []
    with handling(noting(passed)):
        action(store)
    return passed


def killed_at(number: int, store: AdapterStore, action: Action) -> bool:
    """Run the action in a child that is killed at its `number`-th fault point."""
    passed = 0

    def kill(_: str) -> bool:
        nonlocal passed
        passed += 1
        return faults.act("kill") if passed == number else False

    def work() -> None:
        with handling(kill):
            action(store)

    return in_child(work) == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIONS)
def test_a_kill_at_any_fault_point_leaves_the_old_state_or_the_new_one(
    name: str, tmp_path: Path
) -> None:
    action, after = ACTIONS[name]
    filled(tmp_path / "before")
    points = points_of(AdapterStore(shutil.copytree(tmp_path / "before", tmp_path / "0")), action)
    seen = []
    for number, point in enumerate(points, 1):
        root = Path(shutil.copytree(tmp_path / "before", tmp_path / str(number)))
        assert killed_at(number, AdapterStore(root), action), point
        seen.append(state(root))
        assert seen[-1] in (BEFORE, after), point
        # The store is not only readable: the same action still works.
        if seen[-1] == BEFORE:
            action(AdapterStore(root))
        assert state(root) == after, point
    assert not killed_at(len(points) + 1, AdapterStore(tmp_path / "0"), lambda _: None)
    # Once it is done it is not undone.
    assert seen == sorted(seen, key=lambda item: item == after)
    assert BEFORE in seen
    assert after in seen


def test_a_kill_while_traffic_is_divided_leaves_the_old_division_or_the_new_one(
    tmp_path: Path,
) -> None:
    def divide(store: AdapterStore) -> None:
        store.set_traffic("spam", b"new", expected=REV_B)

    filled(tmp_path / "before").set_traffic("spam", b"old", expected=REV_B)
    seen = []
    for number in range(1, 6):
        root = Path(shutil.copytree(tmp_path / "before", tmp_path / str(number)))
        assert killed_at(number, AdapterStore(root), divide)
        store = AdapterStore(root)
        store.collect()
        seen.append(store.traffic("spam"))
        assert sorted(path.name for path in (root / "spam").iterdir()) == sorted(
            ["current", "traffic", f"{REV_A}.safetensors", f"{REV_B}.safetensors"]
        )
    assert seen == [b"old"] * 4 + [b"new"]


def test_the_actions_pass_every_fault_point_of_the_store(tmp_path: Path) -> None:
    written = {
        name
        for module in (durable, store_module, uploads)
        for name in re.findall(r'fault_point\("([a-z.]+)"\)', inspect.getsource(module))
    }
    passed = {
        point
        for number, (action, _) in enumerate(ACTIONS.values())
        for point in points_of(filled(tmp_path / str(number)), action)
    }
    assert passed == written
    assert len(written) >= 15


CHANGES = ("mkdir", "write", "fsync", "replace", "rename", "unlink")


@pytest.mark.parametrize("name", ACTIONS)
def test_a_fault_point_is_in_front_of_every_call_that_changes_the_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kill between two calls would never be tried."""
    action, _ = ACTIONS[name]
    store = filled(tmp_path)
    store.put("other", A)  # the folder of uploads is there by now
    passed: list[str] = []
    with handling(noting(passed)):
        disk = Disk(fails=-1, passed=passed)
        with disk.attached(monkeypatch):
            action(store)
    calls = [call for call in passed if call in CHANGES]
    assert len(calls) >= 3
    # Opening a store makes folders that are there; a folder that was deleted already loses files.
    passed = [call for call in passed if call != "mkdir"]
    for earlier, call in pairwise(passed):
        assert call not in CHANGES or earlier not in CHANGES or earlier == call == "unlink", passed


class Disk:
    """Real calls of `os`, one of which fails. calls: their names, or those given are continued."""

    def __init__(self, fails: int, passed: list[str] | None = None) -> None:
        self.left = fails
        self.calls: list[str] = [] if passed is None else passed

    @contextmanager
    def attached(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name in (*CHANGES, "open", "fchmod", "close"):
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
        except StoreFull:
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
    folder, file = ["mkdir", "fsync"], ["fsync", "replace", "fsync"]
    # The folder of uploads, that of the name, the adapter's file, the list of revisions.
    assert durable == ["mkdir", *folder, *file, *file]
