"""A worker's connection to the engine: made, kept, lost, made again. Knows no request.

Each connection has an identity of its own, so that nothing of one is taken for another's. It is
lost when the engine's process ends, which the operating system tells at once, when the engine does
not know this worker any more, or when it has been silent for long.

A worker may answer from its replica for `LEASE_SECONDS` after the engine sent the last beat that
arrived. The engine waits for a worker's word on each change, and gives a worker up no earlier than
that after its last word: whom it does not wait for does not answer any more.
"""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from service.processes.channel import Channel, Complaints, Outbox
from service.processes.messages import (
    Alive,
    Beat,
    Codec,
    FromEngine,
    Goodbye,
    Hello,
    Message,
    Stranger,
    Undecodable,
)

logger = logging.getLogger(__name__)

LEASE_SECONDS = 2.0
SILENT_SECONDS = 10.0
_RECONNECT_MILLISECONDS = 50
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class Link:
    """Opened with `open`, on the event loop where it calls back.

    Args:
        worker: this worker's number.
        receive: called with every message but the link's own.
        lost: called with the reason, once for each connection that was welcomed or not.
        max_bytes: of a frame.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        endpoint: str,
        worker: int,
        *,
        receive: Callable[[FromEngine], None],
        lost: Callable[[str], None],
        max_bytes: int,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._worker = worker
        self._receive = receive
        self._lost = lost
        self._max_bytes = max_bytes
        self._codec: Codec[FromEngine] = Codec(FromEngine)
        self._complaints = Complaints(logger)
        self._channels: list[Channel] = []
        self._outbox: Outbox | None = None
        # When the last beat was sent, and when anything came last; None before the engine is there.
        self._sent = 0.0
        self._heard: float | None = None
        self._closed = False

    @property
    def fresh(self) -> bool:
        """Whether this worker may answer from what it knows."""
        return monotonic() - self._sent < LEASE_SECONDS

    def open(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        # What waits is bounded by what the engine admits; a limit here could only block or drop.
        socket.sndhwm = socket.rcvhwm = 0
        socket.reconnect_ivl = _RECONNECT_MILLISECONDS
        monitor = socket.get_monitor_socket(_EVENTS)
        channel = Channel(socket, self._take)
        self._channels = [channel, Channel(monitor, self._note)]
        self._outbox = Outbox(channel.send, max_bytes=self._max_bytes)
        self._sent, self._heard = 0.0, None
        socket.connect(self._endpoint)

    def close(self) -> None:
        """Say farewell and be gone; nothing calls back any more."""
        self._closed = True
        self.put(Goodbye())
        self.flush()
        self._disconnect(linger_milliseconds=100)

    def put(self, message: Message) -> None:
        """Send with whatever else this turn of the loop sends."""
        if self._outbox is not None:
            self._outbox.put(message)

    def put_with(self, message: Message, attachment: bytes) -> None:
        if self._outbox is not None:
            self._outbox.put_with(message, attachment)

    def flush(self) -> None:
        if self._outbox is not None:
            self._outbox.flush()

    def check(self) -> None:
        """Give up a connection on which nothing comes any more; call this now and then."""
        if self._heard is not None and monotonic() - self._heard > SILENT_SECONDS:
            self._lose(f"the engine has been silent for {SILENT_SECONDS:.0f} seconds")

    def _take(self, frames: list[bytes]) -> None:
        self._heard = monotonic()
        try:
            messages = self._codec.decode(frames[0])
        except Undecodable as error:
            self._complaints.warn(f"refused a message of the engine: {error}")
            return
        channel = self._channels[0]
        for message in messages:
            if isinstance(message, Stranger):
                self._lose("the engine has given this worker up")
            elif isinstance(message, Beat):
                self._sent = max(self._sent, message.sent)
                self.put(Alive())
            # A connection may be lost by any message; what came on it says nothing any more.
            if not self._channels or self._channels[0] is not channel:
                return
            self._receive(message)

    def _note(self, frames: list[bytes]) -> None:
        event: Any = parse_monitor_message(frames)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._heard = monotonic()
            self.put(Hello(self._worker))
        elif event == zmq.EVENT_DISCONNECTED:
            self._lose("the engine's process is gone")

    def _disconnect(self, *, linger_milliseconds: int = 0) -> None:
        self._outbox, self._heard = None, None
        for channel in reversed(self._channels):
            channel.close(linger_milliseconds)
        self._channels = []

    def _lose(self, reason: str) -> None:
        self._disconnect()
        self._lost(reason)
        # Not from within the callback of a socket that is just being closed.
        asyncio.get_running_loop().call_soon(self._reopen)

    def _reopen(self) -> None:
        if not self._channels and not self._closed:
            self.open()
