"""Clients that change adapters and read them, and write down what they saw: `chaos.history`."""

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence

from chaos.answers import Answers, Version
from chaos.history import ABSENT, UNLOADED, Kind, Operation
from chaos.http import Answer, Connection, Cut, NotConnected, Silent
from chaos.load import PATIENCE_SECONDS, TIMEOUT_MS, judge

_PAUSE_SECONDS = 0.02
_KINDS: tuple[Kind, ...] = ("put", "rollback", "delete", "unload", "load")
_AFTER_FAILURE_SECONDS = 0.5
# Errors 5xx that say that nothing has changed: the change was not begun, or not committed.
_NOT_MADE = ("not_ready", "lease_expired", "store_unreachable")
_WEIGHTS = (10, 4, 2, 1, 2)


class Changes:
    """Writers and readers of some names, and their history.

    Args:
        ports: of services that behave as one; clients are spread over them.
        kinds: the changes that writers make.
        patience: seconds after which a request without an answer is lost.

    Attributes:
        faults: what was wrong with an answer, whatever its order.
        lost: requests that got neither an answer nor the end of their connection.
        answered: operations with an answer; unknown: changes whose outcome is unknown.
        pace: seconds more between two operations of a client.
    """

    def __init__(
        self,
        host: str,
        ports: Sequence[int],
        answers: Answers,
        names: Sequence[str],
        *,
        writers: int,
        readers: int,
        seed: int,
        kinds: Sequence[Kind] = _KINDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._host, self._ports = host, ports
        self._kinds = kinds
        self._patience = patience
        self._weights = [_WEIGHTS[_KINDS.index(kind)] for kind in kinds]
        self._answers = answers
        self._names = names
        self._seed = seed
        self._writers, self._readers = writers, readers
        self._put: dict[str, list[str]] = {name: [] for name in names}
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.pace = 0.0
        self.history: list[Operation] = []
        # Of each operation in the history, where it was asked.
        self._asked: list[int | str] = []
        self.faults: list[str] = []
        self.lost = self.unknown = self.answered = self.cut = self.in_flight = 0

    async def __aenter__(self) -> "Changes":
        self._tasks = [
            *(asyncio.create_task(self._write(number)) for number in range(self._writers)),
            *(asyncio.create_task(self._read(number)) for number in range(self._readers)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def restarted(self, began: float, ended: float) -> None:
        """The engine's process was replaced between these times: unloaded names are loaded."""
        for name in self._names:
            self.saw(Operation(name, "restart", began, ended), self._ports[0])

    @property
    def answerers(self) -> set[int | str]:
        """Who answered: replicas by their names, or else services by their ports."""
        return set(self._asked)

    def seen_at(self, answerer: int | str) -> list[Operation]:
        """All changes, wherever they were made, and the reads of one service or replica."""
        return [
            operation
            for operation, asked in zip(self.history, self._asked, strict=True)
            if operation.kind != "read" or asked == answerer
        ]

    async def read_all(self) -> None:
        """Read every name once more: what was acknowledged must still be there."""
        for port in self._ports:
            connection = Connection(self._host, port)
            for name in self._names:
                await self._predict(connection, name, [0])
            connection.close()

    def saw(self, operation: Operation, answerer: int | str) -> None:
        """Add an operation that this service or replica answered to the history."""
        self.history.append(operation)
        self._asked.append(answerer)

    def _connection(self, number: int) -> Connection:
        return Connection(self._host, self._ports[number % len(self._ports)])

    async def _write(self, number: int) -> None:
        chance = random.Random(f"{self._seed} writer {number}")
        connection = self._connection(number)
        while not self._stopping:
            name = chance.choice(self._names)
            (kind,) = chance.choices(self._kinds, self._weights)
            await self._change(connection, name, kind, chance)
            await asyncio.sleep(self.pace + chance.uniform(0, 4 * _PAUSE_SECONDS))
        connection.close()

    async def _read(self, number: int) -> None:
        chance = random.Random(f"{self._seed} reader {number}")
        connection = self._connection(number)
        while not self._stopping:
            texts = chance.choices(range(len(self._answers.texts)), k=chance.choice((1, 2)))
            await self._predict(connection, chance.choice(self._names), texts)
            await asyncio.sleep(self.pace + chance.uniform(0, _PAUSE_SECONDS))
        connection.close()

    async def _change(
        self, connection: Connection, name: str, kind: Kind, chance: random.Random
    ) -> None:
        path, model = f"/v1/adapters/{name}", f"/v2/repository/models/{name}"
        revision, content, media = ABSENT, b"", "application/json"
        if kind == "put":
            version: Version = self._answers.version()
            revision, content, media = version.revision, version.file, "application/octet-stream"
            request = ("PUT", path)
            self._put[name].append(revision)
        elif kind == "rollback":
            # Of those before: whether it is still there is for the service to say.
            revision = chance.choice(self._put[name][-4:] or ["0" * 64])
            request, content = (
                ("POST", f"{path}/rollback"),
                json.dumps({"revision": revision}).encode(),
            )
        elif kind == "delete":
            request = ("DELETE", path)
        else:
            request, content = ("POST", f"{model}/{kind}"), b"{}"
        began = time.monotonic()
        try:
            answer = await self._ask(connection, *request, content, media)
        except NotConnected:
            # It was never sent.
            await asyncio.sleep(_AFTER_FAILURE_SECONDS)
            return
        ended = time.monotonic()
        if answer is None or answer.status >= 500:
            if answer is not None and answer.error in (None, "internal"):
                self.faults.append(f"{kind} {name}: {answer.status} {str(answer.body)[:200]}")
            if answer is None or answer.error not in _NOT_MADE:
                # It may have happened, or happen later.
                self.unknown += 1
                self.saw(Operation(name, kind, began, math.inf, revision), connection.port)
            # The more of these there are at once, the harder is the search for an order.
            await asyncio.sleep(_AFTER_FAILURE_SECONDS)
        elif answer.status < 300:
            self.answered += 1
            self.saw(
                Operation(name, kind, began, ended, revision), answer.replica or connection.port
            )
        elif answer.error is None:
            self.faults.append(f"{kind} {name}: {answer.status} {str(answer.body)[:200]}")

    async def _predict(self, connection: Connection, name: str, texts: list[int]) -> None:
        content = json.dumps({**self._answers.body(name, texts), "timeout_ms": TIMEOUT_MS})
        began = time.monotonic()
        try:
            answer = await self._ask(
                connection, "POST", "/v1/predict", content.encode(), "application/json"
            )
        except NotConnected:
            return
        ended = time.monotonic()
        if answer is None:
            return
        outcome, detail = judge(self._answers, answer, texts)
        if outcome == "wrong":
            self.faults.append(f"predict {name}: {detail}")
        elif outcome == "right":
            revisions = {result["revision"] for result in answer.body["results"]}
            for revision in revisions:
                self.saw(
                    Operation(name, "read", began, ended, revision),
                    answer.replica or connection.port,
                )
        elif answer.error == "adapter_not_found":
            self.saw(
                Operation(name, "read", began, ended, ABSENT), answer.replica or connection.port
            )
        elif answer.error == "adapter_unloaded":
            self.saw(
                Operation(name, "read", began, ended, UNLOADED), answer.replica or connection.port
            )
        else:
            return
        self.answered += 1

    async def _ask(
        self, connection: Connection, method: str, path: str, content: bytes, media: str
    ) -> Answer | None:
        """None: no answer.

        Raises:
            NotConnected: nobody listens.
        """
        self.in_flight += 1
        try:
            return await connection.ask(method, path, content, seconds=self._patience, kind=media)
        except Silent as error:
            self.lost += 1
            self.faults.append(str(error))
        except Cut:
            self.cut += 1
        finally:
            self.in_flight -= 1
        return None
