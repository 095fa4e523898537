"""Keys as lines of JSON: a file of them, or the same lines in `IDSPAM_KEYS`.

    {"id": "5f0c1d...", "name": "ci", "scopes": ["predict"], "adapters": ["team-*"],
     "expires": "2027-01-31T00:00:00Z", "weight": 2, "requests_per_minute": 600,
     "tokens_per_minute": 100000, "created": "...", "revoked": null, "hash": "blake2b:SALT:DIGEST"}

on one line. Empty lines and lines that begin with `#` are skipped, and kept when the file is
rewritten.
"""

import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from service.access.keys import Key, Secret
from service.access.scopes import SCOPES

# Also the limit of IDSPAM_KEYS: 1,000 keys take less than 0.5 MB.
MAX_BYTES = 16 * 2**20
MAX_WEIGHT = 1000.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{12}")
_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\*?")


class BadKeys(Exception):
    """A file of keys, or a line of it, that cannot be used. The text names file and line."""


class KeyRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A line. Times are RFC 3339 with a time zone."""

    id: str
    name: str
    scopes: list[str]
    adapters: list[str] | None = None
    expires: datetime | None = None
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    created: datetime | None = None
    revoked: datetime | None = None
    hash: str

    def line(self) -> str:
        """As a line of the file, without its end."""
        return msgspec.json.encode(self).decode()


class StoredKey(NamedTuple):
    """A key and the hash of its secret. place: file and line, for messages."""

    key: Key
    secret: Secret
    place: str


_DECODER = msgspec.json.Decoder(KeyRecord)


def records(text: str, source: str) -> Iterator[tuple[int, KeyRecord]]:
    """The records of a text and the indices of their lines.

    Raises:
        BadKeys: a line that is no record.
    """
    for index, line in enumerate(text.split("\n")):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            yield index, _DECODER.decode(line)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise BadKeys(f"{source}: line {index + 1}: {error}") from None


def parse(text: str, source: str) -> list[StoredKey]:
    """The keys of a text.

    Args:
        source: the file or the variable, for messages.

    Raises:
        BadKeys: a line that is no key, or a name or id that two lines have.
    """
    keys: list[StoredKey] = []
    ids: dict[str, int] = {}
    names: dict[str, int] = {}
    for index, record in records(text, source):
        place = f"{source}: line {index + 1}"
        if fault := next(faults(record), None):
            raise BadKeys(f"{place}: {fault}")
        if record.id in ids:
            raise BadKeys(f"{place}: the id {record.id} is also on line {ids[record.id]}")
        ids[record.id] = index + 1
        # The name of a revoked key is free again.
        if record.revoked is None:
            if record.name in names:
                first = names[record.name]
                raise BadKeys(f"{place}: the name {record.name!r} is also on line {first}")
            names[record.name] = index + 1
        keys.append(StoredKey(key_of(record), Secret.parse(record.hash), place))
    return keys


def faults(record: KeyRecord) -> Iterator[str]:
    """What is wrong with a record that has the right types."""
    if not _ID.fullmatch(record.id):
        yield f"id {record.id[:40]!r}: expected 12 hexadecimal digits"
    if not NAME.fullmatch(record.name):
        yield (
            f"name {record.name[:80]!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -, "
            "a letter or digit first"
        )
    for scope in record.scopes:
        if scope not in SCOPES:
            yield f"scope {scope[:40]!r}: expected some of {', '.join(SCOPES)}"
    if not record.scopes:
        yield f"scopes: none, expected some of {', '.join(SCOPES)}"
    if record.adapters is not None:
        if not record.adapters:
            yield "adapters: none; leave the field out for all of them"
        for pattern in record.adapters:
            if not _PATTERN.fullmatch(pattern):
                yield f"adapters: {pattern[:80]!r}: expected a name, or a prefix as team-*"
        if "metrics" in record.scopes:
            yield "scope 'metrics' with adapters: metrics name every adapter; use another key"
    for field in ("expires", "created", "revoked"):
        time = getattr(record, field)
        if time is not None and time.tzinfo is None:
            yield f"{field}: has no time zone, expected a time as 2027-01-31T00:00:00Z"
    if not 0 < record.weight <= MAX_WEIGHT:
        yield f"weight {record.weight:g}: expected more than 0, at most {MAX_WEIGHT:g}"
    for field in ("requests_per_minute", "tokens_per_minute"):
        quota = getattr(record, field)
        if quota is not None and not 1 <= quota <= 10**12:
            yield f"{field} {quota}: expected a whole number from 1 to 10**12"
    try:
        Secret.parse(record.hash)
    except ValueError as error:
        yield f"hash: {error}"


def key_of(record: KeyRecord) -> Key:
    """The key that a record without faults describes."""
    return Key(
        name=record.name,
        id=record.id,
        scopes=frozenset(scope for scope in SCOPES if scope in record.scopes),
        adapters=None if record.adapters is None else tuple(record.adapters),
        expires=float("inf") if record.expires is None else record.expires.timestamp(),
        revoked=None if record.revoked is None else record.revoked.timestamp(),
        weight=record.weight,
        requests_per_minute=record.requests_per_minute,
        tokens_per_minute=record.tokens_per_minute,
    )


def read_text(path: Path) -> str:
    """The text of a file that only its owner can read.

    Raises:
        BadKeys: it cannot be read, others can read or write it, or it is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadKeys(f"{path}: not a file")
            if status.st_mode & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise BadKeys(
                    f"{path}: others can read or change it (mode {mode:04o}): chmod 600 {path}"
                )
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadKeys(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise BadKeys(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadKeys(f"{path}: line {line}: not UTF-8") from None


def read(path: Path) -> list[StoredKey]:
    """The keys of a file.

    Raises:
        BadKeys: as `read_text` and `parse`.
    """
    return parse(read_text(path), str(path))


def write(path: Path, lines: Iterable[str]) -> None:
    """Replace a file in one step, readable by its owner alone; its owner stays the same.

    Raises:
        OSError: it cannot be written.
    """
    folder = path.resolve().parent
    target = path.resolve()
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)
            if target.exists() and os.geteuid() == 0:
                status = target.stat()
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_time(text: str) -> datetime:
    """An ISO time; without a time zone it is UTC, and a date is its first moment.

    Raises:
        ValueError: not such a time.
    """
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def split_lines(text: str) -> Sequence[str]:
    """The lines of a file's text, without an empty one after its last line end."""
    lines = text.split("\n")
    return lines[:-1] if lines and not lines[-1] else lines
