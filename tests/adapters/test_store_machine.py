"""The store against a model of it: any order of changes, damage and restarts."""

import contextlib
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.errors import (
    CurrentRevision,
    DamagedFile,
    RevisionConflict,
    UnknownAdapter,
    UnknownRevision,
)
from adapters.format.store import AdapterStore

KEPT = 3
NAMES = ("a", "b.2", "c-")
CONTENTS = tuple(letter * size for letter, size in ((b"u", 1), (b"v", 10), (b"w", 999), (b"x", 0)))
REVISIONS = {sha256(content).hexdigest(): content for content in CONTENTS}

names = st.sampled_from(NAMES)
contents = st.sampled_from(CONTENTS)
revisions = st.sampled_from(tuple(REVISIONS))


class StoreMachine(RuleBasedStateMachine):
    """histories: what is published, the current revision first. damaged: files that were spoilt."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = AdapterStore(self.root / "adapters", kept=KEPT)
        self.histories: dict[str, list[str]] = {}
        self.damaged: set[tuple[str, str]] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def published(self, name: str, content: bytes) -> None:
        revision = sha256(content).hexdigest()
        history = self.histories.get(name, [])
        changed = history[:1] != [revision]
        self.damaged.discard((name, revision))
        if changed:
            listed = [revision, *(other for other in history if other != revision)]
            self.histories[name] = listed[:KEPT]
            self.damaged -= {(name, dropped) for dropped in listed[KEPT:]}

    @rule(name=names, content=contents, expected=st.one_of(st.none(), revisions))
    def put(self, name: str, content: bytes, expected: str | None) -> None:
        history = self.histories.get(name, [])
        if expected is not None and history[:1] != [expected]:
            with pytest.raises(RevisionConflict):
                self.store.put(name, content, expected=expected)
            return
        result = self.store.put(name, content, expected=expected)
        assert result.revision == sha256(content).hexdigest()
        assert result.created == (not history)
        assert result.changed == (history[:1] != [result.revision])
        self.published(name, content)

    @rule(name=names, content=contents)
    def create(self, name: str, content: bytes) -> None:
        if self.histories.get(name):
            with pytest.raises(RevisionConflict):
                self.store.create(name, content)
            return
        assert self.store.create(name, content).created
        self.published(name, content)

    @rule(name=names, revision=st.one_of(st.none(), revisions), length=st.sampled_from((6, 64)))
    def rollback(self, name: str, revision: str | None, length: int) -> None:
        history = self.histories.get(name, [])
        target = revision or (history[1] if len(history) > 1 else None)
        prefix = revision[:length] if revision is not None else None
        if not history:
            with pytest.raises(UnknownAdapter):
                self.store.rollback(name, prefix)
        elif target not in history:
            with pytest.raises(UnknownRevision):
                self.store.rollback(name, prefix)
        elif (name, target) in self.damaged:
            with pytest.raises(DamagedFile):
                self.store.rollback(name, prefix)
        else:
            assert self.store.rollback(name, prefix) == target
            self.histories[name] = [target, *(other for other in history if other != target)]

    @rule(name=names, expected=st.one_of(st.none(), revisions))
    def delete(self, name: str, expected: str | None) -> None:
        history = self.histories.get(name, [])
        if not history:
            with pytest.raises(UnknownAdapter):
                self.store.delete(name, expected=expected)
        elif expected not in (None, history[0]):
            with pytest.raises(RevisionConflict):
                self.store.delete(name, expected=expected)
        else:
            self.store.delete(name, expected=expected)
            del self.histories[name]
            self.damaged = {item for item in self.damaged if item[0] != name}

    @rule(name=names, revision=revisions)
    def delete_revision(self, name: str, revision: str) -> None:
        history = self.histories.get(name, [])
        error: type[Exception] | None = None
        if not history:
            error = UnknownAdapter
        elif revision == history[0]:
            error = CurrentRevision
        elif revision not in history:
            error = UnknownRevision
        if error is not None:
            with pytest.raises(error):
                self.store.delete_revision(name, revision)
            return
        self.store.delete_revision(name, revision)
        history.remove(revision)
        self.damaged.discard((name, revision))

    @precondition(lambda self: bool(self.histories))
    @rule(data=st.data(), how=st.sampled_from(("flip", "append", "remove")))
    def damage(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.histories)))
        revision = data.draw(st.sampled_from(self.histories[name]))
        path = self.store.path(name, revision)
        if how == "remove":
            path.unlink(missing_ok=True)
        else:
            # Also of a file that is gone: something else lies in its place.
            content = path.read_bytes() if path.exists() else b""
            flipped = bytes(byte ^ 1 for byte in content)
            path.write_bytes(flipped if how == "flip" and content else content + b"!")
            if sha256(path.read_bytes()).hexdigest() == revision:
                self.damaged.discard((name, revision))
                return
        self.damaged.add((name, revision))

    @rule()
    def restart(self) -> None:
        """Another process opens the folder, and finds nothing to collect."""
        self.store = AdapterStore(self.root / "adapters", kept=KEPT)
        assert self.store.collect() == 0

    @rule(name=names, content=contents)
    def interrupted(self, name: str, content: bytes) -> None:
        """A writer died before it changed the list: what it left is collected."""
        folder = self.root / "adapters" / name
        revision = sha256(content + b"never published").hexdigest()
        folder.mkdir(exist_ok=True)
        (folder / f"{revision}.safetensors").write_bytes(content)
        (folder / ".current.1234.tmp").write_bytes(b"half")
        assert self.store.collect() >= 1
        assert not (folder / f"{revision}.safetensors").exists()
        assert not list(folder.glob(".*.tmp"))

    @invariant()
    def names_and_histories_are_those_of_the_model(self) -> None:
        assert self.store.names() == sorted(self.histories)
        for name in NAMES:
            assert self.store.history(name) == self.histories.get(name, [])

    @invariant()
    def every_file_has_its_bytes_or_is_refused(self) -> None:
        for name, history in self.histories.items():
            assert len(history) <= KEPT
            for revision in history:
                if (name, revision) in self.damaged:
                    with pytest.raises(DamagedFile):
                        self.store.read(name, revision)
                else:
                    assert self.store.read(name, revision) == REVISIONS[revision]
            for unlisted in set(REVISIONS) - set(history):
                with contextlib.suppress(DamagedFile):
                    raise AssertionError(self.store.read(name, unlisted))


TestStore = pytest.mark.slow(StoreMachine.TestCase)
TestStore.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
