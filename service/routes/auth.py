"""Who may do what: keys in a header, everything closed unless named open. Knows no route's work.

Without any keys set, everything is open. `api_keys` open `/v1`; `admin_keys` open everything, and
once they are set only they may change adapters.
"""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from enum import Enum, auto

from service.errors import Forbidden, Unauthorized
from service.settings import Settings

OPEN_PATHS = frozenset(
    {
        "/healthz",
        "/readyz",
        "/metrics",
        "/docs",
        "/docs/oauth2-redirect",
        "/openapi.json",
        # The probes of other protocols.
        "/health",
        "/ping",
        "/v2/health/live",
        "/v2/health/ready",
    }
)
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
CHANGING_PATHS = ("/v1/adapters", "/v2/repository/models/")


class _Role(Enum):
    ADMIN = auto()
    USER = auto()


class Keyring:
    """The keys, as hashes: comparison takes the same time whatever was sent, of whatever length."""

    def __init__(self, settings: Settings) -> None:
        self._admin = _hashes(settings.admin_keys)
        self._user = _hashes(settings.api_keys)

    def admit(self, *, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Let a request pass or refuse it; a path that is not named open is closed.

        Raises:
            Unauthorized: no key, or an unknown one.
            Forbidden: an API key where an admin key is asked for.
        """
        if path in OPEN_PATHS:
            return
        changes_adapters = method not in READING_METHODS and path.startswith(CHANGING_PATHS)
        needs_admin = bool(self._admin) and changes_adapters
        if not (self._user or needs_admin):
            return
        role = self._role(_presented(headers))
        if role is None:
            raise Unauthorized("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        if needs_admin and role is not _Role.ADMIN:
            raise Forbidden("changing adapters asks for an admin key")

    def _role(self, key: str | None) -> _Role | None:
        digest = _hash(key or "")
        # Every hash is compared, without stopping at the first that matches.
        admin = sum(hmac.compare_digest(digest, known) for known in self._admin)
        user = sum(hmac.compare_digest(digest, known) for known in self._user)
        if key is None or not (admin or user):
            return None
        return _Role.ADMIN if admin else _Role.USER


def _presented(headers: Mapping[str, str]) -> str | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None


def _hashes(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(_hash(key) for key in keys)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
