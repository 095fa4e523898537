"""Objects under keys, in a folder or in any store that fsspec reaches and that can create
conditionally.

    objects/<sha256>.safetensors    adapter files; immutable
    cards/<sha256>.<name>.<time>.md the model card of a name's revision, which was stored then
    log/<number>.json               the log of changes (`adapters.shared.log`)
    snapshots/<number>.json         the state after an entry
    replicas/<id>.json              each replica's own state
    cluster.json                    format and backbone, written once
"""

import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TypeVar

from adapters.errors import StoreDenied, StoreFailed, StoreFull, StoreUnreachable
from adapters.faults import fault_point
from adapters.format.failures import is_full
from adapters.shared.folder import Folder
from adapters.shared.listed import Listed

T = TypeVar("T")

# How long something must be superseded before `adapters.shared.collect` removes it.
GRACE_SECONDS = 24 * 3600.0
# A collector removes an object at most so long after it has seen how old the object is.
WINDOW_SECONDS = 10.0

# A transfer may take the timeout and one second for each of these.
_BYTES_PER_SECOND = 1 << 20
# Calls that a file system may leave hanging at a time. From then on calls fail at once.
_MAX_HANGING = 32
_PROTOCOL = re.compile(r"([a-z0-9+.-]+)://(.*)")
# The package that each protocol needs. s3fs and adlfs create an object with `If-None-Match: *`,
# gcsfs with `ifGenerationMatch=0`.
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}


class _Backend(Protocol):
    """A kind of store. Methods raise OSError or whatever the store's library raises. size: bytes
    that a read is expected to move."""

    def create(self, key: str, content: bytes) -> bool: ...

    def put(self, key: str, content: bytes) -> None: ...

    def get(self, keys: Sequence[str], size: int) -> list[bytes | None]: ...

    def stat(self, key: str) -> Listed | None: ...

    def delete(self, key: str) -> None: ...

    def list(self, prefix: str) -> list[Listed]: ...

    def remove_unfinished(self, before: float) -> None: ...


class ObjectStore:
    """Blocking and safe to use from many threads. Opened at the first call, so a process may fork
    before it.

    Every call ends within `timeout` seconds, and one more for each MiB that it moves. Every method
    raises StoreUnreachable if the store fails or does not answer: a write may have happened all the
    same. StoreDenied: it refuses the credentials, or none are set. StoreFull: no space is left.

    Args:
        url: a folder, or `s3://bucket/prefix`, `gs://...`, `az://container/prefix`.

    Raises:
        ValueError: a store of this kind cannot be used, or its package is not installed.
    """

    def __init__(self, url: str, *, timeout: float = 10.0) -> None:
        self.url = url
        self.timeout = timeout
        self._folder = _checked(url)
        self._backend: _Backend | None = None
        self._process = 0
        self._lock = threading.Lock()
        # Calls that have outlived their time.
        self._hanging = 0
        self._counting = threading.Lock()

    def create(self, key: str, content: bytes | Path) -> bool:
        """Write an object that does not exist yet; False if it does.

        After StoreUnreachable it may exist or not. False may also mean that this very call wrote
        it, lost the connection and tried again: who must know compares what is there.
        """
        data = _bytes_of(content)
        return self._call(f"create {key}", "create", lambda at: at.create(key, data), len(data))

    def put(self, key: str, content: bytes | Path) -> None:
        """Write an object, or replace it whole."""
        data = _bytes_of(content)
        self._call(f"write {key}", "put", lambda at: at.put(key, data), len(data))

    def get(self, key: str, *, size: int = 0) -> bytes | None:
        """The bytes of an object; None if it does not exist. size: how many are expected."""
        return self.get_all([key], size=size)[0]

    def get_all(self, keys: Sequence[str], *, size: int = 0) -> list[bytes | None]:
        """The bytes of several objects, read at the same time."""
        if not keys:
            return []
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        return self._call(f"read {keys[0]}{more}", "get", lambda at: at.get(keys, size), size)

    def download(self, key: str, path: Path, *, size: int = 0) -> bool:
        """Write the bytes of an object to a file; False if it does not exist.

        Raises:
            OSError: the file cannot be written.
        """
        data = self.get(key, size=size)
        if data is None:
            return False
        path.write_bytes(data)
        return True

    def stat(self, key: str) -> Listed | None:
        """The size and time of an object; None if it does not exist."""
        return self._call(f"look at {key}", "stat", lambda at: at.stat(key))

    def listing(self, prefix: str) -> list[Listed]:
        """All objects in `objects/`, `log/` and so on, with sizes and times, in any order."""
        return self._call(f"list {prefix}", "list", lambda at: at.list(prefix))

    def list(self, prefix: str) -> list[str]:
        """As `listing`: the keys, sorted."""
        return sorted(item.key for item in self.listing(prefix))

    def delete(self, key: str) -> None:
        """Deleting what does not exist is no error."""
        self._call(f"delete {key}", "delete", lambda at: at.delete(key))

    def remove_unfinished(self, before: float) -> None:
        """Remove what writers that were killed before this time left, on the store's own clock."""
        self._call("be tidied", "tidy", lambda at: at.remove_unfinished(before))

    @contextmanager
    def probe(self) -> Iterator[str]:
        """The key of an object to try the store with. It is removed in every end, also after a
        write that failed: it may have happened all the same."""
        key = f"probes/{secrets.token_hex(16)}"
        try:
            yield key
        except BaseException:
            # The first fault is the one to tell.
            with suppress(StoreFailed):
                self.delete(key)
            raise
        self.delete(key)

    def check_conditional(self) -> None:
        """Try whether the store refuses to create an object twice: everything relies on that.

        Raises:
            StoreFailed: it does not.
        """
        with self.probe() as key:
            first, second = self.create(key, b"first"), self.create(key, b"second")
            kept = self.get(key)
        # The first may be False after a connection broke, see `create`.
        if second or kept != b"first":
            raise StoreFailed(
                f"the adapter store {self.url} ignores conditional writes (If-None-Match: *), on "
                f"which replicas rely (created: {first}, then {second})"
            )

    def _call(self, doing: str, point: str, call: Callable[[_Backend], T], size: int = 0) -> T:
        """A call to the store, with the errors that this class documents.

        Args:
            point: names the fault points before and after it.
        """

        def whole() -> T:
            fault_point(f"shared.{point}")
            result = call(self._opened())
            fault_point(f"shared.{point}.done")
            return result

        try:
            # fsspec keeps time itself.
            if self._folder is None:
                return whole()
            return self._in_time(whole, self.timeout + size / _BYTES_PER_SECOND)
        except StoreUnreachable as error:
            raise StoreUnreachable(
                f"the adapter store {self.url} cannot {doing}: {error}"
            ) from None
        except Exception as error:
            raise self._failure(doing, error) from error

    def _failure(self, doing: str, error: Exception) -> StoreFailed:
        if isinstance(error, OSError) and (self._folder is not None or is_full(error)):
            reason = error.strerror or str(error)
            if (
                isinstance(error, FileNotFoundError)
                and self._folder is not None
                and not self._folder.is_dir()
            ):
                reason = "the folder does not exist"
            reason = f"the adapter store {self.url} cannot {doing}: {reason}"
            if is_full(error):
                return StoreFull(reason)
            return (StoreDenied if isinstance(error, PermissionError) else StoreUnreachable)(reason)
        if self._folder is not None:
            raise error
        from adapters.shared.remote import failure

        return failure(self.url, doing, error)

    def _opened(self) -> _Backend:
        with self._lock:
            # A forked process has none of its parent's threads and connections.
            if self._backend is None or self._process != os.getpid():
                self._backend = self._open()
                self._process = os.getpid()
            return self._backend

    def _open(self) -> _Backend:
        if self._folder is not None:
            return Folder(self._folder)
        # It imports fsspec, which a folder does not need.
        from adapters.shared.remote import Remote

        return Remote(self.url, timeout=self.timeout)

    def _in_time(self, call: Callable[[], T], seconds: float) -> T:
        """In a thread that is left alone when its time is over: a network file system without its
        server lets no call return."""
        results: list[T] = []
        errors: list[Exception] = []

        returned, given_up = False, False

        def run() -> None:
            nonlocal returned
            try:
                results.append(call())
            except Exception as error:
                errors.append(error)
            finally:
                with self._counting:
                    returned = True
                    self._hanging -= given_up

        if self._hanging >= _MAX_HANGING:
            raise StoreUnreachable(f"{_MAX_HANGING} calls have not returned yet")
        thread = threading.Thread(target=run, name="shared-store", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise StoreUnreachable(str(error)) from None
        thread.join(seconds)
        with self._counting:
            if not returned:
                given_up = True
                self._hanging += 1
                raise StoreUnreachable("no answer in time")
        if errors:
            raise errors[0]
        return results[0]


def card_key(name: str, revision: str, stored: datetime) -> str:
    """Where the model card of a name's revision is.

    Args:
        stored: when it was uploaded. One that was deleted and comes again has no card.
    """
    return f"cards/{revision}.{name}.{stored.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}.md"


def object_key(revision: str) -> str:
    """Where the bytes of a revision are."""
    return f"objects/{revision}.safetensors"


def store_object(
    store: ObjectStore,
    revision: str,
    content: bytes | Path,
    *,
    grace_seconds: float = GRACE_SECONDS,
    window_seconds: float = WINDOW_SECONDS,
) -> None:
    """Upload a revision's bytes, before a log entry refers to them.

    Where the object exists, it is written again: it may be damaged, and its time must be new.
    Readers find the same bytes. If it was so old that a collector may just be about to remove it,
    this waits until no collector would any more, so that it is there when this returns.

    Raises:
        StoreFailed: as `ObjectStore`.
    """
    key, data = object_key(revision), _bytes_of(content)
    if store.create(key, data):
        return
    before = store.stat(key)
    store.put(key, data)
    after = store.stat(key)
    if before and after and after.modified - before.modified < grace_seconds / 2:
        return
    time.sleep(1.5 * window_seconds)
    if store.stat(key) is None:
        store.put(key, data)


def _checked(url: str) -> Path | None:
    """The folder of a URL; None for a store behind fsspec.

    Raises:
        ValueError: as `ObjectStore`.
    """
    match = _PROTOCOL.fullmatch(url)
    if match is None or match[1] in ("file", "local"):
        path = Path(url if match is None else match[2]).expanduser()
        if not path.is_absolute():
            raise ValueError(f"{url!r}: a folder's path must be absolute")
        return path
    package = _PACKAGES.get(match[1])
    if package is None:
        kinds = ", ".join(f"{each}://" for each in _PACKAGES)
        raise ValueError(
            f"{url!r}: expected a folder or one of {kinds}; "
            "other stores cannot create an object only if it does not exist"
        )
    if not match[2].strip("/"):
        raise ValueError(f"{url!r}: expected {match[1]}://bucket/prefix")
    if find_spec(package) is None:
        raise ValueError(f"{url!r} needs the package {package}, which is not installed")
    return None


def _bytes_of(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content
