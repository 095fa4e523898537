"""A ZeroMQ socket on an event loop, with a callback for each message that arrives.

One reader on the socket's descriptor takes the place of a task for every message. The descriptor is
edge-triggered: after every use of the socket its events must be read until there are none, or the
loop would sleep although messages are there.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextvars import copy_context
from time import monotonic
from typing import TypeAlias

import zmq

from service.ipc.protocol import Message, encode

logger = logging.getLogger(__name__)

# The most messages that are received before other callbacks of the loop get their turn.
_TURN = 256
_WARNING_SECONDS = 5.0
# As plain numbers: each operation on a flag makes another one, which takes a microsecond.
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
Frames: TypeAlias = Sequence[bytes]


class Channel:
    """Receives messages until it is closed, and sends without waiting.

    Args:
        socket: bound or connected; the channel owns it.
        receive: called on the running loop with the frames of each message.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", receive: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        # Of messages received after a send: that of the sender would log its request's id.
        self._variables = copy_context()
        self._descriptor = socket.fileno()
        self._again: asyncio.Handle | None = None
        self._closed = False
        self._loop.add_reader(self._descriptor, self._read)
        # Messages that came before the reader was added triggered no edge for it.
        self._look_again()

    def send(self, frames: Frames) -> bool:
        """Send without waiting; returns whether the socket took the message.

        Parts of 64 KiB and more are not copied: they must not change afterwards.
        """
        if self._closed:
            return False
        *first, last = frames
        try:
            for frame in first:
                self._socket.send(frame, _MORE)
            self._socket.send(last, _NOBLOCK, copy=len(last) < zmq.COPY_THRESHOLD)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        # Sending may have consumed the edge of a message that arrived.
        self._look_again()
        return True

    def close(self, linger_milliseconds: int = 0) -> None:
        """Drop what was not received yet, and what cannot be sent within this time."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
            if self._again is not None:
                self._again.cancel()
            self._socket.close(linger_milliseconds)

    def _events(self) -> int:
        events = self._socket.getsockopt(zmq.EVENTS)
        assert isinstance(events, int)
        return events

    def _look_again(self) -> None:
        if self._again is None and not self._closed:
            self._again = self._loop.call_soon(self._drain, context=self._variables)

    def _read(self) -> None:
        # There is a message, so its events are not asked for.
        self._drain(expected=True)

    def _drain(self, *, expected: bool = False) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for _ in range(_TURN):
            if self._closed or not (expected or self._events() & _POLLIN):
                return
            expected = False
            try:
                frames = self._socket.recv_multipart(_NOBLOCK)
            except zmq.Again:
                # This, too, has read the events.
                return
            try:
                self._receive(frames)
            except Exception:
                logger.exception("a message could not be handled")
        self._look_again()


class Outbox:
    """Gathers all messages of one turn of the loop into one frame.

    Args:
        send_frames: sends the frames of one multipart message.
        max_bytes: of a frame that holds more than one message.
        instead: called with a message that cannot be encoded, and why; returns what is sent in its
            place, if anything.
    """

    def __init__(
        self,
        send_frames: Callable[[Frames], bool],
        *,
        max_bytes: int,
        instead: Callable[[Message, Exception], Message | None],
    ) -> None:
        self._send_frames = send_frames
        self._max_bytes = max_bytes
        self._instead = instead
        self._loop = asyncio.get_running_loop()
        self._messages: list[Message] = []

    def send(self, message: Message) -> None:
        """Send after everything that is about to run on the loop. Messages keep their order."""
        if not self._messages:
            self._loop.call_soon(self.flush)
        self._messages.append(message)

    def flush(self) -> None:
        """Send now."""
        messages, self._messages = self._messages, []
        if messages:
            self._send_parts(messages)

    def _send_parts(self, messages: list[Message]) -> None:
        try:
            frame = encode(messages)
        except Exception:
            # Those of other requests must not be lost with the one that is at fault.
            messages = [item for item in map(self._encodable, messages) if item is not None]
            frame = encode(messages)
        if len(frame) > self._max_bytes and len(messages) > 1:
            half = len(messages) // 2
            self._send_parts(messages[:half])
            self._send_parts(messages[half:])
        else:
            self._send_frames([frame])

    def _encodable(self, message: Message) -> Message | None:
        try:
            encode([message])
        except Exception as error:
            logger.exception("a message cannot be encoded: %s", type(message).__name__)
            return self._instead(message, error)
        return message


class RateLimitedWarnings:
    """Warnings about messages of others: the first one at once, then one every few seconds."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._silent_until = 0.0
        self._suppressed = 0

    def warn(self, message: str) -> None:
        now = monotonic()
        if now < self._silent_until:
            self._suppressed += 1
            return
        self._logger.warning("%s (%d similar warnings suppressed)", message, self._suppressed)
        self._silent_until, self._suppressed = now + _WARNING_SECONDS, 0
