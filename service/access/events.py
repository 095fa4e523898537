"""What happens to keys, as events for an audit log; `Guard.listen` takes who wants them."""

from dataclasses import dataclass, field
from time import time
from typing import Literal, TypeAlias

RefusalReason: TypeAlias = Literal[
    "no_key",
    "unknown_key",
    "expired_key",
    "revoked_key",
    "throttled",
    "scope",
    "adapter",
    "requests_quota",
    "tokens_quota",
    "host",
    "origin",
]


@dataclass(frozen=True, slots=True)
class AccessRefused:
    """A request was refused before any route ran.

    who: the key's name, where the request proved to have it; else empty. key_id: the public part of
    the token, if it has one. address: of the client. at: seconds since the epoch.
    """

    reason: RefusalReason
    who: str
    key_id: str
    address: str
    method: str
    path: str
    request_id: str
    at: float = field(default_factory=time)


@dataclass(frozen=True, slots=True)
class KeysChanged:
    """A process has begun to use another version of the key file.

    Names of keys; `changed` have other rights, or another secret.
    """

    source: str
    added: tuple[str, ...]
    revoked: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    at: float = field(default_factory=time)


AccessEvent: TypeAlias = AccessRefused | KeysChanged
