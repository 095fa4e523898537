"""Adapters on disk as the device wants them: reading one takes a single read and a checksum.

    <store>/.images/<fingerprint>/<revision>-<size>-<time>.image

An adapter file has to be hashed, parsed, folded and cast before a device can use it; all of that
gives the same result each time. So its result, the image, is written when a file is first loaded,
and read from then on. The fingerprint stands for all that decides how an image looks: code, torch,
device, type and backbone. Size and time are those of the adapter file. What changes either finds no
image and makes a new one.

An image is used only if it is whole: it carries a checksum of all its bytes (xxh3, 128 bits), and
names its revision and fingerprint. Any other file is removed, and the adapter file is read. Nothing
depends on images: without space they are not written, and the folder may be deleted at any time.
Whoever can write to it can change answers, as with the adapter files beside it.

    magic 8, checksum 16, zeros 8 | bytes in all 8, header's end 8, memory's start 8, zeros 8 |
    header (JSON) | zeros | memory

The checksum is of everything after the first part. Numbers are little-endian, and memory starts at
a multiple of 64.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from time import monotonic, time
from typing import NamedTuple

import torch
import xxhash

import adapters
from adapters.errors import AdapterError
from adapters.faults import fault_point
from adapters.flattened import Layout
from adapters.format.spec import AdapterSpec
from adapters.format.store import AdapterStore
from adapters.format.uploads import free_bytes
from service.engine.interface import AdapterKey
from service.engine.observer import ImageEvent
from service.engine.runners.base import HostAdapter, Runner

logger = logging.getLogger(__name__)

FOLDER = ".images"
_SUFFIX = ".image"
_MAGIC = b"IDSPIMG1"
_SEAL = struct.Struct("<8s16s8x")
_SIZES = struct.Struct("<QQQ8x")
_ALIGNMENT = 64
# So much of the disk is left to adapter files.
SPARE_BYTES = 256 * 2**20
# Images that wait to be written; further ones are made at their adapters' next load.
_MAX_WAITING = 32
# After a failure, nothing is written for so long.
_PAUSE_SECONDS = 30.0
# A temporary file that was not written to for so long has lost its writer.
_ABANDONED_SECONDS = 600.0
# Parsed headers that are kept, so that a spec is not parsed at every load.
_MAX_PARSED = 4096


class _Refused(Exception):
    """A file is not the image that it should be; the message says why."""


class _Parsed(NamedTuple):
    """A header, and the checksum of the image that it is of."""

    checksum: bytes
    spec: AdapterSpec
    layout: Layout


class Images:
    """The images of one store's adapters for one runner. Safe to use from many threads.

    Args:
        max_bytes: images beyond this are removed, those first that were not used for longest.
        report: called with every event, from any thread.
        writes: whether images are made here. Otherwise another process makes them and keeps them
            within their bytes, and here they are only read.
    """

    def __init__(
        self,
        store: AdapterStore,
        runner: Runner,
        *,
        max_bytes: int,
        report: Callable[[ImageEvent], None] = lambda _: None,
        writes: bool = True,
    ) -> None:
        self.writes = writes
        self._store = store
        self._runner = runner
        self._max_bytes = max_bytes
        self._report = report
        self._fingerprint = fingerprint_of(runner)
        self._folder = store.root / FOLDER / self._fingerprint
        self._lock = threading.Lock()
        # File names to sizes, the least recently used first.
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._nbytes = 0
        self._parsed: OrderedDict[str, _Parsed] = OrderedDict()
        # Of adapters that were loaded from an image or got one. Names with one file may share it.
        self._names: dict[AdapterKey, str] = {}
        self._waiting: set[str] = set()
        # Why nothing could be written last, and until when nothing is tried.
        self._trouble: str | None = None
        self._paused_until = 0.0
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._scanned: Future[None] = self._writing.submit(self._scan)

    @property
    def nbytes(self) -> int:
        """The size of all images."""
        with self._lock:
            return self._nbytes

    @property
    def is_full(self) -> bool:
        """Whether another image would take the place of one of these."""
        with self._lock:
            mean = self._nbytes // max(1, len(self._sizes))
            return self._nbytes + mean > self._max_bytes

    def close(self) -> None:
        """Write no more."""
        self._writing.shutdown(wait=False, cancel_futures=True)

    def settle(self) -> None:
        """Wait until what was asked for up to now is on disk."""
        self._writing.submit(lambda: None).result()

    def source_of(self, key: AdapterKey) -> str | None:
        """What tells an adapter's file from an altered one; None: it cannot be told now.

        Take it before the file is read, and give it to `keep`.
        """
        try:
            return self._store.signature(key.name, key.revision)
        except AdapterError:
            return None

    def has(self, key: AdapterKey) -> bool:
        """Whether there is an image, as far as its name tells, or one is being written."""
        source = self.source_of(key)
        self._scanned.result()
        name = _name_of(key, source)
        with self._lock:
            return source is not None and (name in self._sizes or name in self._waiting)

    def load(
        self,
        key: AdapterKey,
        source: str | None,
        *,
        passing: bool = False,
        begin: Callable[[HostAdapter], object] = lambda _: None,
    ) -> HostAdapter | None:
        """The adapter of an image; None if there is none that can be used.

        Args:
            passing: it is not kept in host memory.
            begin: called with the adapter before the image's checksum is known to be right, so that
                it can be copied meanwhile. It may be called with an adapter that is not returned.
        """
        if source is None:
            return None
        name = self._name_for(key, source)
        if (size := self._size_of(name)) is None:
            return None
        try:
            adapter = self._read(name, key.revision, size, passing=passing, begin=begin)
        except FileNotFoundError:
            self._forget(name)
            return None
        except Exception as error:
            # A kept log record must not keep the memory that the image was read into.
            reason = str(error)
            logger.warning(
                "the image of adapter %s (%s) is not used: %s", key.name, key.revision, reason
            )
            if self.writes:
                self._remove(name)
            self._report("refused")
            return None
        self._report("used")
        return adapter

    def keep(self, key: AdapterKey, source: str | None, adapter: HostAdapter) -> None:
        """Write an adapter's image in the background, if the disk lets us."""
        if source is None or not self.writes or monotonic() < self._paused_until:
            return
        name = self._name_for(key, source)
        with self._lock:
            if name in self._sizes or name in self._waiting or len(self._waiting) >= _MAX_WAITING:
                return
            self._waiting.add(name)
        # The executor refuses once the engine has ended.
        with contextlib.suppress(RuntimeError):
            self._writing.submit(self._write, name, key, source, adapter)

    def discard(self, key: AdapterKey) -> None:
        """Remove the images of an adapter that is served no longer, unless another one uses them:
        the same file may have several names."""
        with self._lock:
            self._names.pop(key, None)
        if not self.writes:
            return
        with contextlib.suppress(RuntimeError):
            self._writing.submit(self._remove_unused, key.revision)

    def sweep(self) -> None:
        """Remove images of other fingerprints, and of revisions that the store does not have."""
        try:
            names = self._store.names()
            listed = {revision for name in names for revision in self._store.history(name)}
        except AdapterError:
            # Which revisions there are cannot be told now.
            return
        for path in _files_in(self._folder.parent):
            if path != self._folder:
                shutil.rmtree(path, ignore_errors=True)
        self._scanned.result()
        self._remove_all(lambda name: name[:64] not in listed)

    def _name_for(self, key: AdapterKey, source: str) -> str:
        name = _name_of(key, source)
        with self._lock:
            self._names[key] = name
        return name

    def _remove_unused(self, revision: str) -> None:
        with self._lock:
            used = {name for key, name in self._names.items() if key.revision == revision}
        self._remove_all(lambda name: name.startswith(revision) and name not in used)

    def _size_of(self, name: str) -> int | None:
        """The size of an image that is used now; None if there is none."""
        if not self.writes:
            # Another process makes and removes them.
            try:
                return os.stat(self._folder / name).st_size
            except OSError:
                return None
        self._scanned.result()
        with self._lock:
            if (size := self._sizes.get(name)) is not None:
                self._sizes.move_to_end(name)
            return size

    def _scan(self) -> None:
        """Find the images of earlier starts, the oldest first."""
        found = []
        for path in _files_in(self._folder):
            # Adapters are served beside a file that cannot be looked at or removed.
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.name.endswith(_SUFFIX):
                    found.append((status.st_mtime_ns, path.name, status.st_size))
                elif time() - status.st_mtime > _ABANDONED_SECONDS:
                    # What an interrupted writer left.
                    path.unlink()
        with self._lock:
            self._sizes.update((name, size) for _, name, size in sorted(found))
            self._nbytes = sum(self._sizes.values())

    def _read(
        self,
        name: str,
        revision: str,
        size: int,
        *,
        passing: bool,
        begin: Callable[[HostAdapter], object],
    ) -> HostAdapter:
        """
        Raises:
            _Refused, and whatever a layout raises that is none: it is not this image.
            OSError: it cannot be read.
        """
        data = self._runner.memory(size, passing=passing)
        view = data.numpy().data
        # As few calls as can be: each gives up the interpreter and waits for it again.
        descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = os.readv(descriptor, [view])
            while done < size and (more := os.readv(descriptor, [view[done:]])):
                done += more
        finally:
            os.close(descriptor)
        if done < size or size < _SEAL.size + _SIZES.size:
            raise _Refused(f"it has {done} bytes, not {size}")
        magic, checksum = _SEAL.unpack_from(view)
        if magic != _MAGIC:
            raise _Refused("it does not begin like an image")
        total, end, start = _SIZES.unpack_from(view, _SEAL.size)
        if total != size or not _SEAL.size + _SIZES.size <= end <= start <= size:
            raise _Refused("its sizes contradict each other")
        with self._lock:
            parsed = self._parsed.get(name)
        adapter = None
        if parsed is not None and parsed.checksum == checksum:
            adapter = self._runner.restore(parsed.spec, parsed.layout, data[start:])
            begin(adapter)
        # It gives up the interpreter, and so the device copies at the same time.
        if xxhash.xxh3_128_digest(view[_SEAL.size :]) != checksum:
            raise _Refused("its checksum is wrong")
        if adapter is None:
            header = bytes(view[_SEAL.size + _SIZES.size : end])
            parsed = self._parse(header, revision, checksum)
            self._keep_parsed(name, parsed)
            adapter = self._runner.restore(parsed.spec, parsed.layout, data[start:])
            begin(adapter)
        return adapter

    def _parse(self, header: bytes, revision: str, checksum: bytes) -> _Parsed:
        values = json.loads(header)
        for field, expected in (("fingerprint", self._fingerprint), ("revision", revision)):
            if values[field] != expected:
                raise _Refused(f"its {field} is {values[field]!r}, not {expected}")
        return _Parsed(checksum, AdapterSpec.from_json(values["spec"]), values["layout"])

    def _keep_parsed(self, name: str, parsed: _Parsed) -> None:
        with self._lock:
            self._parsed[name] = parsed
            while len(self._parsed) > _MAX_PARSED:
                self._parsed.popitem(last=False)

    def _write(self, name: str, key: AdapterKey, source: str, adapter: HostAdapter) -> None:
        """Runs in the writing thread."""
        try:
            # The file was read after its source was taken: it must be the same one.
            if self.source_of(key) != source or monotonic() < self._paused_until:
                return
            self._store_image(name, key.revision, adapter)
        except OSError as error:
            self._paused_until = monotonic() + _PAUSE_SECONDS
            reason = error.strerror or str(error)
            if reason != self._trouble:
                logger.warning("no images of adapters are written, files are read: %s", reason)
            self._trouble = reason
            self._report("failed")
        except Exception:
            logger.exception("the image of adapter %s (%s) cannot be made", key.name, key.revision)
            self._report("failed")
        else:
            if self._trouble is not None:
                logger.info("images of adapters are written again")
            self._trouble = None
            self._report("made")
        finally:
            with self._lock:
                self._waiting.discard(name)

    def _store_image(self, name: str, revision: str, adapter: HostAdapter) -> None:
        layout, memory = self._runner.flatten(adapter)
        values = {
            "fingerprint": self._fingerprint,
            "revision": revision,
            "spec": adapter.spec.to_json(),
            "layout": layout,
        }
        header = json.dumps(values).encode()
        end = _SEAL.size + _SIZES.size + len(header)
        start = end + -end % _ALIGNMENT
        size = start + len(memory)
        if size > self._max_bytes:
            return
        body = _SIZES.pack(size, end, start) + header + bytes(start - end)
        content = memory.numpy().data
        checksum = xxhash.xxh3_128(body)
        checksum.update(content)
        self._make_room(size)
        if free_bytes(self._store.root) < size + SPARE_BYTES:
            raise OSError(f"fewer than {(size + SPARE_BYTES) >> 20} MiB are free")
        # Not the store's own folder: one that is gone stays gone.
        self._folder.parent.mkdir(exist_ok=True)
        self._folder.mkdir(exist_ok=True)
        self._replace(name, [_SEAL.pack(_MAGIC, checksum.digest()) + body, content])
        with self._lock:
            self._nbytes += size - self._sizes.pop(name, 0)
            self._sizes[name] = size

    def _replace(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a whole file or none. Not synced: what a crash leaves has another checksum."""
        temporary = self._folder / f"{secrets.token_hex(16)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o644)
        try:
            try:
                for part in parts:
                    left = memoryview(part)
                    while left:
                        fault_point("image.write")
                        left = left[os.write(descriptor, left) :]
            finally:
                os.close(descriptor)
            fault_point("image.rename")
            os.replace(temporary, self._folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        while True:
            with self._lock:
                if self._nbytes + size <= self._max_bytes or not self._sizes:
                    return
                oldest = next(iter(self._sizes))
            self._remove(oldest)

    def _remove_all(self, chosen: Callable[[str], bool]) -> None:
        with self._lock:
            names = [name for name in self._sizes if chosen(name)]
        for name in names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._forget(name)
        # Where that fails, the next start finds the file again.
        with contextlib.suppress(OSError):
            os.unlink(self._folder / name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._nbytes -= self._sizes.pop(name, 0)
            self._parsed.pop(name, None)


def _files_in(folder: Path) -> list[Path]:
    """None if there is no such folder, or it cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def fingerprint_of(runner: Runner) -> str:
    """32 hexadecimal digits that differ where an adapter's image may."""
    backbone = runner.backbone
    device = backbone.device
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    parts = (
        _MAGIC.decode(),
        runner.form,
        _code(),
        torch.__version__,
        device.type,
        kind,
        str(backbone.dtype),
        backbone.identity.fingerprint,
    )
    return sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _code() -> str:
    """A hash of the package that makes images: more changes it than has to."""
    root, digest = Path(adapters.__file__).parent, sha256(adapters.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _name_of(key: AdapterKey, source: str | None) -> str:
    return f"{key.revision}-{source}{_SUFFIX}"
