"""`python -m service demo`: a made-up load under which every panel of the dashboard lives.

It asks all adapters, the first of them most (Zipf), in a slow wave with bursts on top, never more
at once than it was told. Some requests are wrong on purpose. Unless it may not, it uploads a copy
of an adapter under a name of its own, replaces it, rolls it back, and deletes it in the end.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.client import Input
import asyncio
import secrets
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Awaitable
from contextlib import suppress

from service.commands import CommandFailed
from service.commands.flags import API_KEY_VARIABLE, add_service, count, positive_seconds

if TYPE_CHECKING:
    from service.client import AsyncClient


# --- merged from service.commands.mixture

WAVE_SECONDS, WAVE_HEIGHT = 120.0, 0.6
BURST_EVERY_SECONDS, BURST_SECONDS, BURST_TIMES = 20.0, 3.0, 4.0
SIZES = (1, 1, 1, 1, 2, 3, 4, 8, 16, 32)
# Longer than any adapter reads.
LONG_WORDS = 600

PATTERNS = (
    "could you {do} my {thing} {when}?",
    "why was my {thing} {done} {when}, and who do I ask about it",
    "the {thing} is {how}, and I would {do} it again {when}",
    "WIN a free {thing}! Reply YES {when} to {do} yours now",
    "a {how} film about a {thing} that was {done} {when}",
    "please {do} the {thing} for two people {when}",
    "my {thing} was {done}; what a {how} week",
)
WORDS = {
    "do": ("book", "cancel", "change", "claim", "find", "order", "track", "unlock"),
    "done": ("charged twice", "delivered", "forgotten", "lost", "refused", "stolen", "turned down"),
    "how": ("charming", "dull", "fine", "hopeless", "lovely", "slow", "surprising", "tired"),
    "thing": ("alarm", "bank card", "flight", "parcel", "pin", "playlist", "table", "transfer"),
    "when": ("at six", "before lunch", "last week", "next Monday", "today", "tomorrow night"),
}


def times_at(elapsed: float) -> float:
    """How many times the average rate, so many seconds after the start: a slow wave, and bursts."""
    wave = 1 + WAVE_HEIGHT * math.sin(2 * math.pi * elapsed / WAVE_SECONDS)
    in_burst = elapsed % BURST_EVERY_SECONDS > BURST_EVERY_SECONDS - BURST_SECONDS
    return wave * BURST_TIMES if in_burst else wave


@dataclass(frozen=True, slots=True)
class Mixture:
    """Inputs for these adapters, the first of them most: by Zipf's law."""

    names: Sequence[str]
    chance: random.Random

    def inputs(self) -> list["Input"]:
        """Of one request: 1 to 32, one of ten a pair, one of a hundred too long."""
        return [
            self.long_input() if self.chance.random() < 0.01 else self._input(self._sentence())
            for _ in range(self.chance.choice(SIZES))
        ]

    def long_input(self) -> "Input":
        """One text that its adapter cuts, or refuses to."""
        text = self._sentence()
        while text.count(" ") < LONG_WORDS:
            text += " " + self._sentence()
        return self._input(text)

    def _input(self, text: str) -> "Input":
        from service.client import Input

        (name,) = self.chance.choices(self.names, [1 / (1 + i) for i in range(len(self.names))])
        pair = self._sentence() if self.chance.random() < 0.1 else None
        return Input(text, text_pair=pair, adapter=name)

    def _sentence(self) -> str:
        words = {kind: self.chance.choice(choices) for kind, choices in WORDS.items()}
        return self.chance.choice(PATTERNS).format(**words)


# --- merged from service.commands.demo

HELP = "send a made-up mixture of requests, so that there is something to see"

CHANGE_EVERY_SECONDS, TOLD_EVERY_SECONDS = 5.0, 10.0
GIVE_UP_SECONDS = 60.0
ENDING_SECONDS = 5.0
COPY = "demo-copy-"


@dataclass(frozen=True, slots=True)
class Plan:
    """names: adapters to ask; none: all that are ready. seconds: None is until it is stopped.

    rate: requests a second, on average. patience: seconds until the service must be ready.
    """

    names: Sequence[str]
    seconds: float | None
    rate: float
    in_flight: int
    patience: float
    changes: bool


def add_arguments(parser: ArgumentParser) -> None:
    add_service(parser)
    parser.add_argument(
        "--adapters", nargs="+", default=[], metavar="NAME", help="to ask; default: all"
    )
    parser.add_argument(
        "--seconds", type=positive_seconds, metavar="S", help="default: until it is stopped"
    )
    parser.add_argument(
        "--rate", type=count, default=8, metavar="N", help="requests a second; default: %(default)s"
    )
    parser.add_argument(
        "--in-flight", type=count, default=8, metavar="N", help="at most; default: %(default)s"
    )
    parser.add_argument(
        "--patience",
        type=positive_seconds,
        default=300.0,
        metavar="S",
        help="how long to wait for a service that is not ready yet; default: %(default)g",
    )
    parser.add_argument("--no-changes", action="store_true", help="upload nothing")


def run(arguments: Namespace) -> int:
    import os

    from service.client import AsyncClient
    from service.client.retrying import ONCE

    plan = Plan(
        arguments.adapters,
        arguments.seconds,
        arguments.rate,
        arguments.in_flight,
        arguments.patience,
        not arguments.no_changes,
    )
    key = arguments.api_key or os.environ.get(API_KEY_VARIABLE) or None

    async def demonstrate() -> None:
        # One more for changes, and one for looking whether the service is there.
        connections = plan.in_flight + 2
        async with AsyncClient(
            arguments.url, api_key=key, retries=ONCE, connections=connections
        ) as client:
            await Demo(client, plan).run()

    asyncio.run(demonstrate())
    return 0


class Demo:
    """One run, from a service that may not be there yet to a line about what came of it."""

    def __init__(self, client: "AsyncClient", plan: Plan) -> None:
        self._client = client
        self._plan = plan
        self._chance = random.Random()
        self._names: list[str] = []
        self._copy = COPY + secrets.token_hex(3)
        self._uploaded = self._copied = False
        self._counts: Counter[str] = Counter()
        self._asked: set[asyncio.Task[None]] = set()
        self._answered = time.monotonic()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """
        Raises:
            CommandFailed: nothing to ask, or nobody there for too long.
            Refused: the service wants another key.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        if not await self._ready():
            return
        self._names = await self._find()
        _say(f"asking {', '.join(self._names)}")
        beside = [asyncio.create_task(self._tell())]
        if self._plan.changes:
            beside.append(asyncio.create_task(self._change()))
        try:
            async with asyncio.timeout(self._plan.seconds):
                await self._ask_on()
        except TimeoutError:
            pass
        finally:
            await self._end(beside)
        _say(self._told())

    async def _ready(self) -> bool:
        """False: stopped before it was."""
        from service.client import ClientError

        until, told = time.monotonic() + self._plan.patience, False
        while not self._stop.is_set():
            try:
                health = await self._client.ready()
                if health.ok:
                    return True
                why = health.reason or "it is not ready"
            except ClientError as error:
                why = str(error)
            if time.monotonic() > until:
                raise CommandFailed(f"waited {self._plan.patience:g} s for a service: {why}")
            if not told:
                _say(f"waiting for a service: {why}")
                told = True
            await self._pause(1.0)
        return False

    async def _find(self) -> list[str]:
        ready = [item.name for item in await self._client.adapters() if item.state == "ready"]
        if unknown := [name for name in self._plan.names if name not in ready]:
            raise CommandFailed(
                f"--adapters: not ready or not there: {', '.join(unknown)}; "
                f"there are {', '.join(ready) or 'none'}"
            )
        # What another demo left or still uses is its own business.
        names = list(self._plan.names) or [name for name in ready if not name.startswith(COPY)]
        if not names:
            raise CommandFailed("no adapter is ready: upload one, or serve the zoo")
        return names

    async def _ask_on(self) -> None:
        began = time.monotonic()
        while not self._stop.is_set():
            elapsed = time.monotonic() - began
            rate = self._plan.rate * times_at(elapsed)
            await self._pause(self._chance.expovariate(rate))
            if len(self._asked) < self._plan.in_flight:
                task = asyncio.create_task(self._counted(self._ask()))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)
            if time.monotonic() - self._answered > GIVE_UP_SECONDS:
                raise CommandFailed(f"the service has been gone for {GIVE_UP_SECONDS:g} s")

    async def _ask(self) -> None:
        """One request: nineteen of twenty are well meant."""
        mixture = Mixture([*self._names, self._copy] if self._copied else self._names, self._chance)
        inputs, chance = mixture.inputs(), self._chance.random()
        if chance < 0.02:
            await self._client.predict(inputs, "no-such-adapter-of-the-demo")
        elif chance < 0.03:
            await self._client.predict([])
        elif chance < 0.04:
            await self._client.predict([mixture.long_input()], truncate=False)
        elif chance < 0.044:
            # It cannot be kept: the service's failure, as far as anybody can see.
            await self._client.predict(inputs, timeout_ms=1)
        else:
            explain = chance > 0.95
            self._counts["texts"] += len(await self._client.predict(inputs, explain=explain))

    async def _change(self) -> None:
        """Upload, replace, roll back, be refused; again and again. Cancelled in the end."""
        from service.client import ClientError, NotAllowed

        names = self._chance.sample(self._names, min(2, len(self._names)))
        turn = 0
        while True:
            try:
                match turn % 4:
                    case 0 | 1:
                        file = (await self._client.download(names[turn % len(names)])).data
                        # Even of one that is broken off something may be there to be deleted.
                        self._uploaded = True
                        await self._client.upload(self._copy, file)
                        self._copied = True
                    case 2:
                        await self._client.rollback(self._copy)
                    case _:
                        await self._client.upload(self._copy, b"no adapter")
            except NotAllowed:
                _say("this key may not change adapters: nothing is uploaded")
                return
            except ClientError as error:
                self._counts[_outcome(error)] += 1
            turn += 1
            await asyncio.sleep(CHANGE_EVERY_SECONDS)

    async def _counted(self, asked: Awaitable[None]) -> None:
        from service.client import ClientError, Unreachable

        try:
            await asked
            self._counts["answered"] += 1
        except ClientError as error:
            self._counts[_outcome(error)] += 1
            if isinstance(error, Unreachable):
                # It may be restarting. In flight meanwhile, so that fewer are sent.
                await self._pause(1.0)
                return
        self._answered = time.monotonic()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TOLD_EVERY_SECONDS)
            _say(self._told())

    def _told(self) -> str:
        counts = ", ".join(f"{number} {what}" for what, number in sorted(self._counts.items()))
        return counts or "nothing was asked"

    async def _end(self, beside: Sequence["asyncio.Task[None]"]) -> None:
        from service.client import ClientError

        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        if self._asked:
            await asyncio.wait(self._asked, timeout=ENDING_SECONDS)
        if self._uploaded:
            with suppress(ClientError, TimeoutError):
                async with asyncio.timeout(ENDING_SECONDS):
                    await self._client.delete(self._copy)

    async def _pause(self, seconds: float) -> None:
        """Shorter if it is stopped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


def _outcome(error: Exception) -> str:
    from service.client import Refused

    return f"got {error.status}" if isinstance(error, Refused) else "unreachable"


def _say(line: str) -> None:
    sys.stdout.write(f"demo: {line}\n")
    sys.stdout.flush()
