"""The one decision about a request: who sent it, and whether they may."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from time import monotonic, time
from typing import NamedTuple, NoReturn, Protocol

from service.access.events import AccessEvent, AccessRefused, RefusalReason
from service.access.key_file import BadKeys
from service.access.keyring import KeySource
from service.access.keys import ANYONE, Key, forbidden_adapter, parse_token
from service.access.quotas import Quotas
from service.access.scopes import SCOPES, Match
from service.access.throttle import Throttle
from service.access.web_pages import KnownHosts, KnownOrigins
from service.errors import (
    Forbidden,
    KeyExpired,
    KeyRevoked,
    QuotaExceeded,
    TooManyFailures,
    Unauthorized,
)
from service.observability.logs import request_id
from service.settings import Settings

logger = logging.getLogger(__name__)

# How often the key file is looked at. A change holds in every process after this time at most.
RELOAD_SECONDS = 2.0
# Refusals of one reason are logged this often; each of them is counted and goes to the audit log.
_LOG_SECONDS = 10.0
_SEND_A_KEY = "send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"

# Whose request this task answers. The catalog shows what this key may see.
current_key: ContextVar[Key] = ContextVar("current_key", default=ANYONE)


_READ = {
    name.encode(): name
    for name in ("authorization", "host", "origin", "sec-fetch-site", "x-api-key")
}


def headers_for_guard(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers that decide about a request, from those of the server.

    One pass over all of them takes a third of what it takes to look for each.
    """
    return {_READ[name]: value.decode("latin-1") for name, value in headers if name in _READ}


class Counter(Protocol):
    """Counts refusals."""

    def access_refused(self, reason: RefusalReason) -> None: ...


class Client(NamedTuple):
    """Where a request comes from and what it asks for, for records of its refusal."""

    address: str
    method: str
    path: str


class Guard:
    """Decides about requests, and watches the key file while `watch` runs.

    Args:
        quotas: shared by the processes of the service; by default this process's own.

    Raises:
        BadKeys: the keys cannot be used.
    """

    def __init__(self, settings: Settings, counter: Counter, quotas: Quotas | None = None) -> None:
        self._counter = counter
        self._quotas = quotas or Quotas()
        self._source = KeySource(settings)
        self._keyring = self._source.read()
        # Why the file cannot be used now.
        self._trouble: str | None = None
        self._throttle = Throttle()
        own = [name for name in (settings.host, settings.published) if name]
        self._hosts = KnownHosts((*settings.allowed_hosts, *own))
        self._origins = KnownOrigins(settings.allowed_origins)
        self._listeners: list[Callable[[AccessEvent], None]] = []
        # By reason: when the next line may be logged, and how many were left out since the last.
        self._logged: dict[RefusalReason, tuple[float, int]] = {}
        for fault in self._keyring.unusable():
            logger.warning("%s", fault)
        if self._source.required and not len(self._keyring):
            logger.warning("%s: no keys, so every request is refused", self._source.path)

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return self._source.required

    def listen(self, listener: Callable[[AccessEvent], None]) -> None:
        """Call with every event from now on, in the task of its request; must not raise or wait."""
        self._listeners.append(listener)

    def authorise(self, match: Match | None, headers: Mapping[str, str], client: Client) -> Key:
        """Who sent a request, if they may.

        Args:
            match: the route that is asked for; None if there is none, which needs a key too.
            headers: with names in lower case; `headers_for_guard` has those that are read.

        Raises:
            Unauthorized: no key, or one that is unknown, expired or revoked.
            Forbidden: the key has not the scope that the route needs, or is not for its adapter; or
                a web page of another origin sends this.
            QuotaExceeded: the key has used up its requests or tokens.
            TooManyFailures: too many wrong keys came from this address.
        """
        if match is not None and match.need.is_probe:
            return ANYONE
        self._check_page(match, headers, client)
        if not self._source.required or (match is not None and match.need.is_open):
            return ANYONE
        key = self._identify(headers, client)
        if match is not None:
            self._require(key, match, client)
        if wait := self._quotas.take_request(key):
            error = QuotaExceeded("this key has used up its requests", retry_after=wait)
            self._refuse("requests_quota", client, error, key)
        return key

    def renew(self) -> Key:
        """The key of this task's request as it is now, for a request that takes long. It takes its
        place for what is done from here on.

        Raises:
            Unauthorized, Forbidden: it was removed or revoked, has expired, or may not predict any
                more.
        """
        key = current_key.get()
        if not key.id:
            return key
        stored = self._keyring.by_id.get(key.id)
        if stored is None:
            raise Unauthorized("the key was removed meanwhile")
        _check_usable(stored.key)
        if "predict" not in stored.key.scopes:
            raise Forbidden("the key may no longer predict")
        current_key.set(stored.key)
        return stored.key

    def tokens_wait(self) -> float:
        """Seconds until the key of this task's request has tokens left; 0 if it has some now."""
        return self._quotas.tokens_wait(current_key.get())

    def charge(self, tokens: int) -> None:
        """Count the tokens of an answer against the quota of its request's key."""
        self._quotas.charge(current_key.get(), tokens)

    def _require(self, key: Key, match: Match, client: Client) -> None:
        """
        Raises:
            Forbidden, QuotaExceeded: as `authorise`.
        """
        scopes = match.need.scopes
        if scopes and not scopes & key.scopes:
            self._refuse("scope", client, _out_of_scope(key, match), key)
        if match.adapter is not None and not key.may_use(match.adapter):
            self._refuse("adapter", client, forbidden_adapter(key, match.adapter), key)
        predicts = "predict" in scopes and client.method == "POST"
        if predicts and (wait := self._quotas.tokens_wait(key)):
            error = QuotaExceeded("this key has used up its tokens", retry_after=wait)
            self._refuse("tokens_quota", client, error, key)

    async def watch(self) -> None:
        """Read the key file whenever it has changed, until cancelled."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            if self._source.path is None:
                return
            if await asyncio.to_thread(self._source.has_changed):
                await self.reload()

    async def reload(self) -> None:
        """Use the keys of the file as it is now; if it cannot be used, the old ones stay."""
        try:
            keyring = await asyncio.to_thread(self._source.read)
        except BadKeys as error:
            # It is tried again every two seconds.
            if str(error) != self._trouble:
                logger.error("the keys stay as they were: %s", error)
            self._trouble = str(error)
            return
        self._trouble = None
        before, self._keyring = self._keyring, keyring
        change = keyring.changes_since(before, str(self._source.path))
        logger.info("keys reloaded keys=%d", len(keyring))
        if change is not None:
            self._tell(change)

    def _check_page(self, match: Match | None, headers: Mapping[str, str], client: Client) -> None:
        # A page can send what a browser sends for it, but not a key that it does not have.
        if not self._source.required:
            try:
                self._hosts.check(headers.get("host"))
            except Forbidden as error:
                self._refuse("host", client, error)
        elif match is None or not match.need.changes_adapters:
            return
        if client.method != "GET":
            try:
                self._origins.check(headers)
            except Forbidden as error:
                self._refuse("origin", client, error)

    def _identify(self, headers: Mapping[str, str], client: Client) -> Key:
        credentials = _credentials(headers)
        if credentials is None:
            self._refuse("no_key", client, Unauthorized(_SEND_A_KEY))
        # A token cannot be guessed: the right one is accepted also from an address that many share
        # and where somebody guesses. A key of the environment may be a short word.
        key = self._keyring.by_token(credentials)
        if key is None:
            if wait := self._throttle.wait(client.address):
                error = TooManyFailures("too many wrong keys from this address", retry_after=wait)
                self._refuse("throttled", client, error)
            key = self._keyring.by_plain_key(credentials)
        if key is None:
            self._throttle.failed(client.address)
            parts = parse_token(credentials)
            error_ = Unauthorized(f"the key is not known: {_SEND_A_KEY}")
            self._refuse("unknown_key", client, error_, key_id=parts[0] if parts else "")
        # Who has the secret may learn what became of the key; for others it is an unknown one.
        try:
            _check_usable(key)
        except KeyRevoked as error:
            self._refuse("revoked_key", client, error, key)
        except KeyExpired as error:
            self._refuse("expired_key", client, error, key)
        return key

    def _refuse(
        self,
        reason: RefusalReason,
        client: Client,
        error: Exception,
        key: Key = ANYONE,
        *,
        key_id: str = "",
    ) -> NoReturn:
        self._counter.access_refused(reason)
        path = client.path[:200]
        event = AccessRefused(
            reason,
            key.name,
            key.id or key_id,
            client.address,
            client.method,
            path,
            request_id.get(),
        )
        self._log(event)
        self._tell(event)
        raise error

    def _log(self, event: AccessRefused) -> None:
        next_at, left_out = self._logged.get(event.reason, (0.0, 0))
        now = monotonic()
        if now < next_at:
            self._logged[event.reason] = (next_at, left_out + 1)
            return
        self._logged[event.reason] = (now + _LOG_SECONDS, 0)
        logger.warning(
            "access refused reason=%s key=%s address=%s method=%s path=%r more=%d",
            event.reason,
            event.who or event.key_id or "-",
            event.address,
            event.method,
            event.path,
            left_out,
        )

    def _tell(self, event: AccessEvent) -> None:
        for listener in self._listeners:
            listener(event)


def _check_usable(key: Key) -> None:
    """
    Raises:
        KeyRevoked, KeyExpired: it is no longer to be used.
    """
    if key.revoked is not None:
        raise KeyRevoked("this key was revoked")
    if key.expires <= time():
        raise KeyExpired("this key has expired")


def _out_of_scope(key: Key, match: Match) -> Forbidden:
    needed = " or ".join(scope for scope in SCOPES if scope in match.need.scopes)
    has = ", ".join(scope for scope in SCOPES if scope in key.scopes)
    return Forbidden(f"this needs a key with the scope {needed}; this key has {has}")


def _credentials(headers: Mapping[str, str]) -> str | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None
