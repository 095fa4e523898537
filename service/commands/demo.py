"""`python -m service demo`: made-up load, so that every panel of the dashboard shows something.

It sends requests for all adapters, most for the first (Zipf), in a slow wave with bursts, with at
most `--in-flight` requests open. Some requests are wrong on purpose. Without `--no-changes` it also
uploads a copy of an adapter under a name of its own, lets another one read half of its texts as a
shadow, promotes that, rolls it back and, when it ends, deletes it.
"""

import asyncio
import math
import random
import secrets
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cli.shell import Command, CommandFailed
from service.client import ClientError, Input, NotAllowed, Refused, Rule, Unreachable
from service.client.environment import api_key, ca_file, service_url
from service.client.retry import ONCE
from service.commands.flags import add_service, count, positive_seconds

if TYPE_CHECKING:
    from service.client import AsyncClient

CHANGE_EVERY_SECONDS, REPORT_EVERY_SECONDS = 5.0, 10.0
GIVE_UP_SECONDS = 60.0
ENDING_SECONDS = 5.0
COPY = "demo-copy-"
NO_LIMITS = Rule(max_error_rate=None, max_disagreement=None, max_latency_ratio=None)

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


def add_arguments(parser: ArgumentParser) -> None:
    add_service(parser)
    parser.add_argument(
        "--adapters", nargs="+", default=[], metavar="NAME", help="adapters to use; default: all"
    )
    parser.add_argument(
        "--seconds", type=positive_seconds, metavar="S", help="default: until it is stopped"
    )
    parser.add_argument(
        "--rate", type=count, default=8, metavar="N", help="requests a second; default: %(default)s"
    )
    parser.add_argument(
        "--in-flight",
        type=count,
        default=8,
        metavar="N",
        help="requests at a time; default: %(default)s",
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
    from service.client import AsyncClient

    async def demonstrate() -> None:
        # Two more connections: for changes, and to see whether the service is ready.
        async with AsyncClient(
            service_url(arguments.url),
            api_key=api_key(arguments.api_key),
            ca=ca_file(),
            retries=ONCE,
            connections=arguments.in_flight + 2,
        ) as client:
            await Demo(client, arguments).run()

    asyncio.run(demonstrate())
    return 0


COMMAND = Command(
    "send a made-up mixture of requests, so that there is something to see", run, add_arguments
)


class Demo:
    """One run: waits for the service, sends requests until the end, and prints its counts."""

    def __init__(self, client: "AsyncClient", arguments: Namespace) -> None:
        self._client = client
        self._arguments = arguments
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
            CommandFailed: there is no adapter, or no service for too long.
            Refused: the service needs another key.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        if not await self._ready():
            return
        self._names = await self._adapters()
        _say(f"asking {', '.join(self._names)}")
        background = [asyncio.create_task(self._report())]
        if not self._arguments.no_changes:
            background.append(asyncio.create_task(self._change()))
        try:
            async with asyncio.timeout(self._arguments.seconds):
                await self._ask_until_stopped()
        except TimeoutError:
            pass
        finally:
            await self._end(background)
        _say(self._summary())

    async def _ready(self) -> bool:
        """Wait for the service; False if the demo was stopped before it was ready."""
        until, announced = time.monotonic() + self._arguments.patience, False
        while not self._stop.is_set():
            try:
                health = await self._client.ready()
                if health.ok:
                    return True
                reason = health.reason or "it is not ready"
            except ClientError as error:
                reason = str(error)
            if time.monotonic() > until:
                waited = f"waited {self._arguments.patience:g} s for a service"
                raise CommandFailed(f"{waited}: {reason}")
            if not announced:
                _say(f"waiting for a service: {reason}")
                announced = True
            await self._pause(1.0)
        return False

    async def _adapters(self) -> list[str]:
        every = await self._client.adapters()
        ready = [adapter.name for adapter in every if adapter.state == "ready"]
        if unknown := [name for name in self._arguments.adapters if name not in ready]:
            raise CommandFailed(
                f"--adapters: not ready or not there: {', '.join(unknown)}; "
                f"there are {', '.join(ready) or 'none'}"
            )
        # The copy of another demo may be deleted at any time.
        names = self._arguments.adapters or [name for name in ready if not name.startswith(COPY)]
        if not names:
            raise CommandFailed("no adapter is ready: upload one, or serve the zoo")
        return names

    async def _ask_until_stopped(self) -> None:
        began = time.monotonic()
        while not self._stop.is_set():
            elapsed = time.monotonic() - began
            rate = self._arguments.rate * load_factor(elapsed)
            await self._pause(self._chance.expovariate(rate))
            if len(self._asked) < self._arguments.in_flight:
                task = asyncio.create_task(self._counted(self._ask()))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)
            if time.monotonic() - self._answered > GIVE_UP_SECONDS:
                raise CommandFailed(f"the service has been gone for {GIVE_UP_SECONDS:g} s")

    async def _ask(self) -> None:
        """One request; about one in twenty is wrong on purpose."""
        mixture = Mixture([*self._names, self._copy] if self._copied else self._names, self._chance)
        inputs, chance = mixture.inputs(), self._chance.random()
        if chance < 0.02:
            await self._client.predict(inputs, "no-such-adapter-of-the-demo")
        elif chance < 0.03:
            await self._client.predict([])
        elif chance < 0.04:
            await self._client.predict([mixture.long_input()], truncate=False)
        elif chance < 0.044:
            # No service can meet this deadline; it counts as a failure of the service.
            await self._client.predict(inputs, timeout_ms=1)
        else:
            explain = chance > 0.95
            self._counts["texts"] += len(await self._client.predict(inputs, explain=explain))

    async def _change(self) -> None:
        """Upload, try a shadow, be refused, promote, roll back; again and again, until
        cancelled."""
        names = self._chance.sample(self._names, min(2, len(self._names)))
        turn = 0
        while True:
            try:
                match turn % 5:
                    case 0:
                        file = (await self._client.download(names[0])).data
                        # Even an upload that fails may have published a copy.
                        self._uploaded = True
                        await self._client.upload(self._copy, file)
                        self._copied = True
                    case 1:
                        file = (await self._client.download(names[-1])).data
                        staged = await self._client.upload(self._copy, file, stage=True)
                        # It answers something else, and that is to be seen for long.
                        await self._client.set_traffic(
                            self._copy, staged.revision, 50, shadow=True, rule=NO_LIMITS
                        )
                    case 2:
                        await self._client.upload(self._copy, b"no adapter")
                    case 4:
                        await self._client.promote(self._copy)
                        await self._client.rollback(self._copy)
            except NotAllowed:
                _say("this key may not change adapters: nothing is uploaded")
                return
            except ClientError as error:
                self._counts[_outcome(error)] += 1
            turn += 1
            await asyncio.sleep(CHANGE_EVERY_SECONDS)

    async def _counted(self, request: Awaitable[None]) -> None:
        try:
            await request
            self._counts["answered"] += 1
        except ClientError as error:
            self._counts[_outcome(error)] += 1
            if isinstance(error, Unreachable):
                # The service may be restarting. This request stays in flight, so fewer are sent.
                await self._pause(1.0)
                return
        self._answered = time.monotonic()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_SECONDS)
            _say(self._summary())

    def _summary(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in sorted(self._counts.items()))
        return counts or "no request was sent"

    async def _end(self, background: Sequence["asyncio.Task[None]"]) -> None:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        if self._asked:
            await asyncio.wait(self._asked, timeout=ENDING_SECONDS)
        if self._uploaded:
            with suppress(ClientError, TimeoutError):
                async with asyncio.timeout(ENDING_SECONDS):
                    await self._client.delete(self._copy)

    async def _pause(self, seconds: float) -> None:
        """Wait, or return at once when the demo is stopped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


def _outcome(error: Exception) -> str:
    return f"got {error.status}" if isinstance(error, Refused) else "unreachable"


def _say(line: str) -> None:
    sys.stdout.write(f"demo: {line}\n")
    sys.stdout.flush()


def load_factor(elapsed: float) -> float:
    """The load at a time in seconds, relative to the average rate: a slow wave, and bursts."""
    wave = 1 + WAVE_HEIGHT * math.sin(2 * math.pi * elapsed / WAVE_SECONDS)
    in_burst = elapsed % BURST_EVERY_SECONDS > BURST_EVERY_SECONDS - BURST_SECONDS
    return wave * BURST_TIMES if in_burst else wave


@dataclass(frozen=True, slots=True)
class Mixture:
    """Makes inputs for these adapters, most of them for the first, by Zipf's law."""

    names: Sequence[str]
    chance: random.Random

    def inputs(self) -> list[Input]:
        """The inputs of one request: 1 to 32; one in ten is a pair, one in a hundred too long."""
        return [
            self.long_input() if self.chance.random() < 0.01 else self._input(self._sentence())
            for _ in range(self.chance.choice(SIZES))
        ]

    def long_input(self) -> Input:
        """A text that its adapter truncates or refuses."""
        text = self._sentence()
        while text.count(" ") < LONG_WORDS:
            text += " " + self._sentence()
        return self._input(text)

    def _input(self, text: str) -> Input:
        (name,) = self.chance.choices(self.names, [1 / (1 + i) for i in range(len(self.names))])
        pair = self._sentence() if self.chance.random() < 0.1 else None
        return Input(text, text_pair=pair, adapter=name)

    def _sentence(self) -> str:
        words = {kind: self.chance.choice(choices) for kind, choices in WORDS.items()}
        return self.chance.choice(PATTERNS).format(**words)
