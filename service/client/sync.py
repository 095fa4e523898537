"""The client that blocks. Its awaited twin is `service.client.aio`; both drive exchanges."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from service.client import operations as calls
from service.client.batching import (
    IN_FLIGHT,
    PER_REQUEST,
    TIMEOUT_MS,
    Portion,
    check_sizes,
    counted_on,
    portions_of,
)
from service.client.errors import Closed, Refused
from service.client.retrying import Call, Exchange, Exchanger, Retries
from service.client.transport import Address, BlockingWire, Hooks, drive
from service.client.types import (
    AdapterDetail,
    AdapterFile,
    AdapterSummary,
    Answer,
    Health,
    Options,
    Published,
    Result,
    Text,
)

T = TypeVar("T")


class Client:
    """One service, by any number of threads. Close it, or use it as a context manager.

    Args:
        url: where the service's paths begin: `http://host:8000`.
        api_key: sent with every request.
        seconds: until an answer must have begun, beside a prediction's own `timeout_ms`.
        connections: requests at a time; more wait for one to be answered.
        retries: what is repeated, and for how long. Of what may have had its effect only that which
            may have it twice: reading, predicting, uploads without a condition, rollbacks to a
            named revision.
        headers: sent with every request.
        event_hooks, transport: httpx's own: hooks see every attempt, and may add an X-Request-ID.

    Raises:
        InvalidCall: no such address, key or number can be.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        seconds: float = 60.0,
        connections: int = 16,
        retries: Retries | None = None,
        headers: Mapping[str, str] | None = None,
        event_hooks: Hooks | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        address = Address(url, api_key, headers or {}, seconds, connections)
        self._connections = connections
        self._wire = BlockingWire(address, event_hooks=event_hooks, transport=transport)
        self._exchanger = Exchanger(url, retries or Retries())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls raise Closed from now on. Closing twice is fine."""
        self._wire.close()

    def predict(
        self,
        inputs: Text | Sequence[Text],
        adapter: str | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Classify one text or pair, or a list of them, in one request: all are answered or none.

        Raises:
            ClientError: whichever of its tree.
        """
        return self._call(calls.predict(inputs, adapter, options))

    def classify(
        self,
        inputs: Iterable[Text],
        adapter: str | None = None,
        *,
        per_request: int = PER_REQUEST,
        in_flight: int = IN_FLIGHT,
        **options: Unpack[Options],
    ) -> Generator[Result, None, None]:
        """Classify any number of inputs, several requests at a time; results come in their order.

        No more inputs are held than `in_flight` requests have. Answers that are there are given out
        before the next input is asked for. In errors, `inputs.N` counts from the first of all.
        Without `timeout_ms` a request has ten minutes.

        Raises:
            ClientError: whichever of its tree, when the results before it have been given out.
        """
        check_sizes(
            inputs,
            per_request=per_request,
            in_flight=in_flight,
            connections=self._connections,
        )
        return self._classified(
            portions_of(inputs, per_request=per_request), adapter, options, in_flight=in_flight
        )

    def adapters(self) -> list[AdapterSummary]:
        """All adapters by name."""
        return self._run(calls.adapters(self._exchanger))

    def adapter(self, name: str) -> AdapterDetail:
        """One adapter: its spec, its revisions, and whether it can be served."""
        return self._call(calls.show(name))

    def upload(
        self,
        name: str,
        file: bytes | Path | str,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> Published:
        """Publish an adapter file, its bytes or its path, under a name.

        Args:
            if_match: only over this revision; "*": only if the name exists.
            if_none_match: only over another revision than this; "*": only if the name is new.

        Raises:
            OSError: the file cannot be read.
            Conflict: a condition does not hold.
            ClientError: whichever else of its tree.
        """
        return self._call(calls.upload(name, file, if_match=if_match, if_none_match=if_none_match))

    def download(self, name: str, revision: str | None = None) -> AdapterFile:
        """An adapter's file: the current revision, or the one that begins like this."""
        return self._call(calls.download(name, revision))

    def rollback(
        self, name: str, revision: str | None = None, *, if_match: str | None = None
    ) -> Published:
        """Serve the previous revision again, or the one that begins like this."""
        return self._call(calls.rollback(name, revision, if_match=if_match))

    def delete(self, name: str, *, if_match: str | None = None) -> None:
        """Forget a name and all its revisions."""
        self._call(calls.delete(name, if_match=if_match))

    def health(self) -> Health:
        """Whether the service can do its work; asked once."""
        return self._run(self._exchanger.once()(calls.health()))

    def ready(self) -> Health:
        """Whether requests should be sent now, and why not; asked once."""
        return self._run(self._exchanger.once()(calls.ready()))

    def metrics(self) -> str:
        """Everything measured, in Prometheus' text format."""
        return self._call(calls.metrics())

    def _call(self, call: Call[T]) -> T:
        return self._run(self._exchanger(call))

    def _run(self, exchange: Exchange[T], pause: Callable[[float], object] = time.sleep) -> T:
        return drive(exchange, self._wire, pause)

    def _classified(
        self, portions: Iterator[Portion], adapter: str | None, options: Options, *, in_flight: int
    ) -> Generator[Result, None, None]:
        patient: Options = {"timeout_ms": TIMEOUT_MS, **options}
        left = threading.Event()

        def pause(seconds: float) -> None:
            if left.wait(seconds):
                raise Closed("nobody waits for this answer any more")

        def ask(portion: Portion) -> Answer:
            try:
                call = calls.predict(portion.inputs, adapter, patient)
                return self._run(self._exchanger(call), pause)
            except Refused as error:
                raise counted_on(error, portion.first) from None

        waiting: deque[Future[Answer]] = deque()
        try:
            for portion in portions:
                waiting.append(_in_thread(ask, portion))
                while waiting and (len(waiting) == in_flight or waiting[0].done()):
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            left.set()


def _in_thread(work: Callable[[Portion], T], portion: Portion) -> "Future[T]":
    """In a thread of its own, which nobody waits for at the end: a request cannot be broken off."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(portion))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="classify", daemon=True).start()
    return future
