"""The keys in force: those of the file and of the environment, found without a search."""

import hmac
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import time

from service.access.events import KeysChanged
from service.access.exposure import has_keys
from service.access.key_file import BadKeys, StoredKey, parse, read
from service.access.keys import Key, Secret, parse_token
from service.access.scopes import SCOPES, Scope
from service.settings import Settings

# What `IDSPAM_API_KEYS` may do; `IDSPAM_ADMIN_KEYS` may do everything.
API_KEY_SCOPES: frozenset[Scope] = frozenset({"predict", "adapters:read", "metrics"})
# Compared with when there is no key of that id, so that ids cannot be told by the time it takes.
_NO_SECRET = Secret.of("")
# Makes the table of plain keys one whose order tells nothing about them.
_TABLE_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys in force at one time. by_id: those with tokens. plain: those without, by hash."""

    by_id: Mapping[str, StoredKey] = field(default_factory=dict)
    plain: Mapping[bytes, Key] = field(default_factory=dict)

    def by_token(self, token: str) -> Key | None:
        """The key of a token; expired and revoked ones too. None for a wrong one."""
        parts = parse_token(token)
        if parts is None:
            return None
        stored = self.by_id.get(parts[0])
        fits = (_NO_SECRET if stored is None else stored.secret).fits(parts[1])
        return stored.key if fits and stored is not None else None

    def by_plain_key(self, key: str) -> Key | None:
        """The key of `IDSPAM_API_KEYS` or `IDSPAM_ADMIN_KEYS` that this is."""
        return self.plain.get(_table_hash(key))

    def __len__(self) -> int:
        return len(self.by_id) + len(self.plain)

    def unusable(self) -> list[str]:
        """A sentence for each key that is expired."""
        now = time()
        return [
            f"{stored.place}: the key {stored.key.name!r} has expired"
            for stored in self.by_id.values()
            if stored.key.revoked is None and stored.key.expires <= now
        ]

    def changes_since(self, before: "Keyring", source: str) -> KeysChanged | None:
        """What has changed in the keys with tokens; None if nothing has."""
        old, new = before.by_id, self.by_id
        common = [(old[key_id], new[key_id]) for key_id in new if key_id in old]
        revoked = tuple(
            after.key.name
            for then, after in common
            if after.key.revoked is not None and then.key.revoked is None
        )
        change = KeysChanged(
            source,
            added=tuple(new[key_id].key.name for key_id in new if key_id not in old),
            revoked=revoked,
            removed=tuple(old[key_id].key.name for key_id in old if key_id not in new),
            changed=tuple(
                after.key.name
                for then, after in common
                if then[:2] != after[:2] and after.key.name not in revoked
            ),
        )
        return change if any((change.added, revoked, change.removed, change.changed)) else None


class KeySource:
    """Where the keys come from, and whether they are there.

    Attributes:
        required: whether the service has keys at all; if so, every request needs one.
    """

    def __init__(self, settings: Settings) -> None:
        self.path: Path | None = settings.keys_file
        self._environment = settings.keys
        self._plain = _plain_keys(settings)
        self._signature: tuple[int, ...] | None = None
        self.required = has_keys(settings)

    def read(self) -> Keyring:
        """All keys, now.

        Raises:
            BadKeys: the file or a line of it cannot be used, or a name or id is in both places.
        """
        # Until this has worked: a read that failed for want of a descriptor is tried again.
        self._signature = None
        signature = self._sign()
        stored = parse(self._environment, "IDSPAM_KEYS")
        if self.path is not None:
            stored += read(self.path)
        keyring = Keyring(_by_id(stored), self._plain)
        self._signature = signature
        return keyring

    def has_changed(self) -> bool:
        """Whether the file is another one than that of the last `read`."""
        return self.path is not None and self._sign() != self._signature

    def _sign(self) -> tuple[int, ...] | None:
        if self.path is None:
            return None
        try:
            status = os.stat(self.path)
        except OSError:
            return ()
        return (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


def keyring_of(settings: Settings) -> Keyring:
    """The keys that the settings describe.

    Raises:
        BadKeys: as `KeySource.read`.
    """
    return KeySource(settings).read()


def _by_id(stored: Sequence[StoredKey]) -> dict[str, StoredKey]:
    by_id: dict[str, StoredKey] = {}
    names: dict[str, StoredKey] = {}
    for item in stored:
        first = by_id.setdefault(item.key.id, item)
        if item.key.revoked is None and first is item:
            first = names.setdefault(item.key.name, item)
        if first is not item:
            what = "id" if first.key.id == item.key.id else "name"
            value = item.key.id if what == "id" else repr(item.key.name)
            raise BadKeys(f"{item.place}: the {what} {value} is also in {first.place}")
    return by_id


def _plain_keys(settings: Settings) -> dict[bytes, Key]:
    """Keys of the environment have no names, only a position. No key of a file has a colon."""
    keys = _numbered("env:api", settings.api_keys, API_KEY_SCOPES)
    return keys | _numbered("env:admin", settings.admin_keys, frozenset(SCOPES))


def _numbered(kind: str, keys: Iterable[str], scopes: frozenset[Scope]) -> dict[bytes, Key]:
    return {
        _table_hash(key): Key(name=f"{kind}-{number}", scopes=scopes)
        for number, key in enumerate(keys, start=1)
    }


def _table_hash(key: str) -> bytes:
    text = key.encode("utf-8", "surrogatepass")
    return hmac.digest(_TABLE_KEY, text, "sha256")
