"""A key: what its holder may do, and how the token that is sent is compared with it.

A token is `idspam_ID_SECRET`. The id finds the key without a search; the secret has 256 random
bits. Only a salted BLAKE2b hash of the secret is kept. A hash that is slow on purpose, as passwords
need, would protect nothing here: 2**256 secrets cannot be tried at any speed. It would cost every
request milliseconds, and let strangers spend them.
"""

import hashlib
import hmac
import math
import re
import secrets
from dataclasses import dataclass, field
from typing import NamedTuple

from service.access.scopes import SCOPES, Scope
from service.errors import Forbidden

_TOKEN = re.compile(r"idspam_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_HASH = re.compile(r"blake2b:([0-9a-f]{32}):([0-9a-f]{64})")
_PERSON = b"idspam-key"


class Secret(NamedTuple):
    """The hash of a secret. salt: 16 bytes. digest: 32 bytes."""

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, secret: str) -> "Secret":
        """With a new salt."""
        salt = secrets.token_bytes(16)
        return cls(salt, _digest(secret, salt))

    @classmethod
    def parse(cls, text: str) -> "Secret":
        """
        Raises:
            ValueError: not `blake2b:SALT:DIGEST` in hexadecimal.
        """
        found = _HASH.fullmatch(text)
        if found is None:
            raise ValueError("expected blake2b:SALT:DIGEST, 32 and 64 hexadecimal digits")
        return cls(bytes.fromhex(found[1]), bytes.fromhex(found[2]))

    def __str__(self) -> str:
        return f"blake2b:{self.salt.hex()}:{self.digest.hex()}"

    def fits(self, secret: str) -> bool:
        """Whether it is the hash of this secret; takes equally long whatever the answer is."""
        return hmac.compare_digest(_digest(secret, self.salt), self.digest)


@dataclass(frozen=True, slots=True)
class Key:
    """What the holder of a key may do.

    name: in logs, metrics and quotas; empty if the service has no keys. id: public, part of the
    token; empty for a key without one. adapters: names, and prefixes that end in `*`; None is all
    of them. expires, revoked: seconds since the epoch. weight: the holder's share when several
    compete, relative to others. requests_per_minute, tokens_per_minute: quotas; None is no limit.
    """

    name: str = ""
    id: str = ""
    scopes: frozenset[Scope] = frozenset(SCOPES)
    adapters: tuple[str, ...] | None = None
    expires: float = math.inf
    revoked: float | None = None
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    _names: frozenset[str] = field(init=False, repr=False, compare=False)
    _prefixes: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        patterns = self.adapters or ()
        prefixes = tuple(item[:-1] for item in patterns if item.endswith("*"))
        object.__setattr__(self, "_names", frozenset(patterns))
        object.__setattr__(self, "_prefixes", prefixes)

    def may_use(self, adapter: str) -> bool:
        """Whether the key is for an adapter of this name; whether there is one does not matter."""
        return self.adapters is None or adapter in self._names or adapter.startswith(self._prefixes)

    @property
    def sees_every_name(self) -> bool:
        return self.adapters is None and "adapters:read" in self.scopes


# The sender of a request to a service without keys, and of one that needs none.
ANYONE = Key()


def forbidden_adapter(key: Key, name: str) -> Forbidden:
    """The refusal of an adapter that a key is not for; the same whether or not there is one."""
    return Forbidden(f"this key is for adapters {', '.join(key.adapters or ())}, not {name[:80]!r}")


def new_token() -> tuple[str, str, Secret]:
    """A new token, its id, and what is kept of its secret."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return f"idspam_{key_id}_{secret}", key_id, Secret.of(secret)


def parse_token(token: str) -> tuple[str, str] | None:
    """The id and the secret of a token; None if it does not have the form of one."""
    found = _TOKEN.fullmatch(token)
    return None if found is None else (found[1], found[2])


def _digest(secret: str, salt: bytes) -> bytes:
    return hashlib.blake2b(
        secret.encode("utf-8", "surrogatepass"), digest_size=32, salt=salt, person=_PERSON
    ).digest()
