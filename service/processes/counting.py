"""The one place where everything is counted: what the parts relay, and the parts themselves.

Counters outlive the processes that count in them. An engine's gauges end with it.
"""

import asyncio
import logging
from collections.abc import Callable

import zmq

from service.metrics import Metrics
from service.processes.channel import Channel, Complaints
from service.processes.events import Counted, Exposition, State, ToSupervisor
from service.processes.messages import Codec, Undecodable, encode

logger = logging.getLogger(__name__)

# An event takes some 100 bytes, and a part keeps 100,000 at most.
_MAX_FRAME_BYTES = 64 * 2**20


class Counting:
    """Binds when made.

    Args:
        refresh: brings up to date what is measured only when asked; called before each answer.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        endpoint: str,
        metrics: Metrics,
        *,
        refresh: Callable[[], None],
    ) -> None:
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.maxmsgsize = _MAX_FRAME_BYTES
        socket.bind(endpoint)
        self._metrics = metrics
        self._refresh = refresh
        self._codec: Codec[ToSupervisor] = Codec(ToSupervisor)
        self._complaints = Complaints(logger)
        self._engine: int | None = None
        self._counted: list[Counted] = []
        self._scrapes: list[tuple[bytes, int]] = []
        self._answers: set[asyncio.Task[None]] = set()
        self._soon = False
        self._channel = Channel(socket, self._take)

    def close(self) -> None:
        self._channel.close()

    def engine_is(self, process: int | None) -> None:
        """Whose states hold from now on; those of the process before are void."""
        if self._engine is not None:
            self._metrics.engine_gone()
        self._engine = process

    def _take(self, frames: list[bytes]) -> None:
        try:
            messages = self._codec.decode(frames[-1])
        except Undecodable as error:
            self._complaints.warn(f"refused a message: {error}")
            return
        for message in messages:
            if isinstance(message, Counted):
                self._counted.append(message)
            else:
                self._scrapes.append((frames[0], message.id))
        if not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self._apply)

    def _apply(self) -> None:
        self._soon = False
        counted, self._counted = self._counted, []
        scrapes, self._scrapes = self._scrapes, []
        # The engine tells of a new adapter before any worker can count in its series, but sockets
        # are read in no particular order.
        for message in sorted(counted, key=lambda item: item.process != self._engine):
            for event in message.events:
                if not isinstance(event, State) or message.process == self._engine:
                    event.report(self._metrics)
        if scrapes:
            answer = asyncio.ensure_future(self._answer(scrapes))
            self._answers.add(answer)
            answer.add_done_callback(self._answers.discard)

    async def _answer(self, scrapes: list[tuple[bytes, int]]) -> None:
        self._refresh()
        # Of ten thousand adapters this takes a second, and children must be watched meanwhile.
        text = await asyncio.to_thread(self._metrics.exposition)
        for identity, number in scrapes:
            self._channel.send([identity, encode([Exposition(number, text)])])
