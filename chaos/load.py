"""Clients that predict without pause, and what became of each of their requests."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from chaos.answers import Answers
from chaos.http import Answer, Connection, Cut, NotConnected, Silent

# Well beyond every bound of the service: an engine that hangs is noticed after five seconds.
TIMEOUT_MS = 8_000
PATIENCE_SECONDS = 20.0
_PAUSE_SECONDS = 0.01

# right: the texts' answers. refused: an error of the service, which says what is wrong. cut: the
# connection ended, with the process that held it. unconnected: nobody listened. wrong: anything
# else that was received. lost: neither answer nor end of the connection.
Outcome: TypeAlias = Literal["right", "refused", "cut", "unconnected", "wrong", "lost"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request. began, ended: on the clock of `time.monotonic`. detail: of an outcome that is
    not right."""

    began: float
    ended: float
    outcome: Outcome
    detail: str = ""


class Load:
    """A closed loop of some clients, each on a connection of its own.

    Args:
        names: the adapters that are asked.

    Attributes:
        pace: seconds more between two requests of a client.
    """

    def __init__(
        self, host: str, port: int, answers: Answers, names: list[str], *, clients: int, seed: int
    ) -> None:
        self._host, self._port = host, port
        self._answers = answers
        self._names = names
        self._clients = clients
        self._seed = seed
        self.requests: list[Request] = []
        self.in_flight = 0
        self.pace = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._spread = 0
        self._news = asyncio.Event()

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait for what is in flight: a request without an answer is what this is about."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def spread(self) -> None:
        """Let every client connect anew: after a worker has died, the others have all of them."""
        self._spread += 1

    def counts(self, since: int = 0) -> Mapping[Outcome, int]:
        """Requests by outcome, from this number on."""
        return Counter(request.outcome for request in self.requests[since:])

    def seconds_down(self, since: int, began: float) -> float:
        """From `began` until the last failing request has failed and one that was sent after it is
        answered right; 0 if none failed."""
        failed = [
            request
            for request in self.requests[since:]
            if request.outcome != "right" and request.ended >= began
        ]
        if not failed:
            return 0.0
        last = max(request.began for request in failed)
        right = min(
            (
                request.ended
                for request in self.requests[since:]
                if request.outcome == "right" and request.began >= last
            ),
            default=float("inf"),
        )
        return max(right, *(request.ended for request in failed)) - began

    async def answered(self, *, after: float, times: int, seconds: float) -> bool:
        """Whether this many requests that began after a time are answered right, in a row."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            late = [request for request in self.requests[-4 * times :] if request.began > after]
            if len(late) >= times and all(item.outcome == "right" for item in late[-times:]):
                return True
            self._news.clear()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._news.wait()
            except TimeoutError:
                return False
        return False

    async def _run(self, number: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        connection = Connection(self._host, self._port)
        spread = self._spread
        while not self._stopping:
            if spread != self._spread:
                spread = self._spread
                connection.close()
            texts = chance.choices(range(len(self._answers.texts)), k=chance.choice((1, 1, 2, 5)))
            name = chance.choice(self._names)
            content = json.dumps({**self._answers.body(name, texts), "timeout_ms": TIMEOUT_MS})
            began = time.monotonic()
            self.in_flight += 1
            outcome, detail = await self._ask(connection, content.encode(), texts)
            self.in_flight -= 1
            self.requests.append(Request(began, time.monotonic(), outcome, detail))
            self._news.set()
            pause = _PAUSE_SECONDS if outcome == "right" else 5 * _PAUSE_SECONDS
            await asyncio.sleep(self.pace + pause)
        connection.close()

    async def _ask(
        self, connection: Connection, content: bytes, texts: list[int]
    ) -> tuple[Outcome, str]:
        try:
            answer = await connection.ask("POST", "/v1/predict", content, seconds=PATIENCE_SECONDS)
        except NotConnected as error:
            return "unconnected", str(error)
        except Cut as error:
            return "cut", str(error)
        except Silent as error:
            return "lost", str(error)
        return judge(self._answers, answer, texts)


def judge(answers: Answers, answer: Answer, texts: list[int]) -> tuple[Outcome, str]:
    """Whether an answer of the service is right."""
    if answer.status == 200 and isinstance(answer.body, dict):
        fault = answers.fault_of(texts, answer.body.get("results"))
        return ("right", "") if fault is None else ("wrong", fault)
    if answer.status >= 400 and answer.error is not None and answer.error != "internal":
        return "refused", f"{answer.status} {answer.error}"
    return "wrong", f"{answer.status} {str(answer.body)[:200]}"
