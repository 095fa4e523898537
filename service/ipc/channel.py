"""A ZeroMQ socket on an event loop: callbacks in, messages out. Knows no kind of message.

One reader on the socket's descriptor instead of a task for every message. That descriptor only
tells that something changed: after every look at the socket its events are asked for until there
are none, or the loop would sleep on messages that are there.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TypeAlias

import zmq

from service.ipc.protocol import Message, encode

logger = logging.getLogger(__name__)

# So many messages are taken before everything else on the loop has its turn.
_TURN = 256
_SILENT_SECONDS = 5.0

Frames: TypeAlias = Sequence[bytes]


class Channel:
    """Takes messages as they come; closed with `close`, for ever.

    Args:
        socket: bound or connected, owned from here on.
        receive: called on the running loop with the frames of each message.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", receive: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._descriptor = socket.fileno()
        self._again: asyncio.Handle | None = None
        self._closed = False
        self._loop.add_reader(self._descriptor, self._drain)
        # What came before there was a reader made no edge that it could see.
        self._look_again()

    def send(self, frames: Frames) -> bool:
        """Send without waiting; says whether anybody was there to take it.

        Parts of 64 KiB and more are not copied: they must not change afterwards.
        """
        if self._closed:
            return False
        small = len(frames[-1]) < zmq.COPY_THRESHOLD
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=small)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        # Sending may have used up the edge that tells of a message.
        self._look_again()
        return True

    def close(self, linger_milliseconds: int = 0) -> None:
        """Drop what was not taken yet, and what cannot be sent within so long."""
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
            self._again = self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for _ in range(_TURN):
            if self._closed or not self._events() & zmq.POLLIN:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._receive(frames)
            except Exception:
                logger.exception("a message could not be handled")
        self._look_again()


class Outbox:
    """Gathers all messages of one turn of the loop into one frame.

    Args:
        send: takes the frames of one multipart message.
        max_bytes: of a frame that holds more than one message.
    """

    def __init__(self, send: Callable[[Frames], bool], *, max_bytes: int) -> None:
        self._send = send
        self._max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        self._messages: list[Message] = []

    def put(self, message: Message) -> None:
        """Send it behind all that is about to run on the loop."""
        if not self._messages:
            self._loop.call_soon(self.flush)
        self._messages.append(message)

    def put_with(self, message: Message, attachment: bytes) -> None:
        """Send it with bytes that are not copied, behind what was put before."""
        self.flush()
        self._send([encode([message]), attachment])

    def flush(self) -> None:
        """Send now."""
        messages, self._messages = self._messages, []
        if messages:
            self._send_parts(messages)

    def _send_parts(self, messages: list[Message]) -> None:
        frame = encode(messages)
        if len(frame) > self._max_bytes and len(messages) > 1:
            half = len(messages) // 2
            self._send_parts(messages[:half])
            self._send_parts(messages[half:])
        else:
            self._send([frame])


class Complaints:
    """Warnings about what others send: the first at once, then one every few seconds at most."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._silent_until = 0.0
        self._kept_back = 0

    def warn(self, message: str) -> None:
        now = monotonic()
        if now < self._silent_until:
            self._kept_back += 1
            return
        self._logger.warning("%s (%d more like this before)", message, self._kept_back)
        self._silent_until, self._kept_back = now + _SILENT_SECONDS, 0
