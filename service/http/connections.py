"""The connections of this process: how many there may be, how long each may take, and the counts.

A connection is refused only if there is none that waits for a request; otherwise the one that has
waited longest makes room, as in nginx. So connections that send nothing, or never finish their
headers, cannot lock anyone out.
"""

import resource
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from service.engine.observer import ConnectionEnd
from service.settings import Settings
from service.start import StartFailed

DEFAULT_CONNECTIONS = 4096
# Descriptors for everything but connections: files, the store, sockets between processes.
OTHER_DESCRIPTORS = 256
# Beyond the limit, so many connections are still told so with a 503; others are just closed.
TOLD_CONNECTIONS = 128
# What all refused clients together may send between two checks. Reading it takes about 5 ms.
DISCARDED_BYTES = 32 * 2**20
# After SIGTERM: for what is just being received, and for clients that take none of their answer.
DRAIN_BODY_SECONDS = 0.5
DRAIN_ANSWER_SECONDS = 1.0
# Idle connections are closed once none was used for so long, or after the second time in any case.
DRAIN_QUIET_SECONDS, DRAIN_IDLE_SECONDS = 0.1, 1.0


class Connection(Protocol):
    """What is asked of a connection here."""

    def check(self, now: float) -> None:
        """End the connection if its time is over."""

    def evict(self) -> None:
        """Close it, for another one."""

    def drain(self) -> None:
        """Close it after the present answer, or after the next one if it is idle."""


@dataclass(frozen=True, slots=True)
class Limits:
    """
    connections: in this process. head_seconds: from a connection's or a request's beginning to its
    last header. stall_seconds: in each such period of a body or an answer, `bytes_per_second` times
    the period must be moved, or all that is left.
    """

    connections: int
    head_seconds: float
    stall_seconds: float
    bytes_per_second: int


class Connections:
    """Passed to every connection of this process.

    Args:
        changed: called with the number of open connections when one was opened or closed.
        opened: called with it at every check. ended: with a reason and a number, likewise.

    Attributes:
        limits: those of the settings; tighter ones while the service drains.
        waiting: connections without a request, or with an unfinished head, longest first.
        discards: how many bytes may be read and discarded until the next check.
        draining: whether SIGTERM has come. bodies_until: when unfinished bodies are then refused.
        last_request: when SIGTERM came, or the last request after it.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        changed: Callable[[int], None] | None = None,
        opened: Callable[[int], None],
        ended: Callable[[ConnectionEnd, int], None],
    ) -> None:
        self.limits = limits
        self.waiting: dict[Connection, None] = {}
        self.discards = DISCARDED_BYTES
        self.draining = False
        self.last_request = 0.0
        self.bodies_until = 0.0
        self._changed = changed
        self._opened = opened
        self._ended = ended
        self._ends: Counter[ConnectionEnd] = Counter()

    def has_room(self, connection: Connection, number: int) -> bool:
        """Whether a new connection, the number-th, may stay."""
        if self._changed is not None:
            self._changed(number)
        if number > self.limits.connections:
            if not self.waiting:
                return False
            self.ended("evicted")
            next(iter(self.waiting)).evict()
        self.waiting[connection] = None
        return True

    def left(self, connection: Connection, number: int) -> None:
        """A connection was closed. number: how many there are now."""
        self.waiting.pop(connection, None)
        if self._changed is not None:
            self._changed(number)

    def ended(self, reason: ConnectionEnd) -> None:
        """Count a connection that the service ends; reported with the next check."""
        self._ends[reason] += 1

    def check(self, connections: Collection[Connection], now: float) -> None:
        """Called a few times a second: one pass over all connections costs less than two timers
        for each request."""
        self.discards = DISCARDED_BYTES
        for connection in list(connections):
            connection.check(now)
        self._opened(len(connections))
        for reason, number in self._ends.items():
            self._ended(reason, number)
        self._ends.clear()

    def drain(self, connections: Collection[Connection], now: float) -> None:
        """Soon nothing but requests that have come completely is waited for."""
        self.draining = True
        self.last_request = now
        self.bodies_until = now + DRAIN_BODY_SECONDS
        self.limits = Limits(
            self.limits.connections,
            min(DRAIN_BODY_SECONDS, self.limits.head_seconds),
            min(DRAIN_ANSWER_SECONDS, self.limits.stall_seconds),
            self.limits.bytes_per_second,
        )
        for connection in list(connections):
            connection.drain()

    def may_be_asked(self, now: float, since: float) -> bool:
        """Whether an idle connection should stay open, so that its client's next request is
        answered, with `Connection: close`, and not reset.

        Args:
            since: when everything else was over.
        """
        if not self.waiting or now - since > DRAIN_IDLE_SECONDS:
            return False
        return now - self.last_request < DRAIN_QUIET_SECONDS


def limits_of(settings: Settings) -> Limits:
    """
    Raises:
        StartFailed: more connections than this process may have descriptors.
    """
    return Limits(
        _connection_limit(settings),
        settings.header_seconds,
        settings.stall_seconds,
        settings.min_bytes_per_second,
    )


def _connection_limit(settings: Settings) -> int:
    """The setting, or as many as there are descriptors for. With one descriptor left for each
    connection, `accept` never fails."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The usual soft limit of 1024 is for programs that use `select`.
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY:
        return settings.max_connections or DEFAULT_CONNECTIONS
    possible = most - OTHER_DESCRIPTORS - TOLD_CONNECTIONS
    if possible < (settings.max_connections or 1):
        raise StartFailed(
            f"IDSPAM_MAX_CONNECTIONS: {settings.max_connections or 'auto'}: a process may have "
            f"{most} descriptors (ulimit -n), enough for {max(0, possible)} connections"
        )
    return settings.max_connections or min(DEFAULT_CONNECTIONS, possible)
