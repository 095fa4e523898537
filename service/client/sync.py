"""The blocking client. `service.client.aio` has its awaitable twin."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, Self, TypeVar, Unpack

import httpx

from service.client import operations
from service.client.background import Background
from service.client.batch import (
    IN_FLIGHT,
    PER_REQUEST,
    TIMEOUT_MS,
    Chunk,
    check_many,
    check_sizes,
    chunks_of,
    fault_last,
    renumbered,
    results_of,
)
from service.client.environment import from_environment
from service.client.errors import Closed, Refused
from service.client.retry import ONCE, Call, Exchanger, Retries
from service.client.streaming import STREAM_SECONDS, Lines
from service.client.transport import Address, BlockingTransport, Hooks
from service.client.types import (
    AdapterDetail,
    AdapterFile,
    AdapterState,
    AdapterSummary,
    Answer,
    Card,
    Drift,
    Embeddings,
    Health,
    Options,
    Published,
    Ranking,
    Result,
    RevisionDifference,
    Rule,
    Text,
    TrafficDetail,
    Unanswered,
    UncertainText,
    UploadReport,
    Wait,
)

T = TypeVar("T")


class Client:
    """A client of one service, for any number of threads. Close it, or use it in a `with` block.

    Args:
        url: where the service's paths begin: `http://host:8000`. None: address, key and certificate
            authorities are those of the environment (`service.client.environment`).
        api_key: sent with every request.
        seconds: until an answer must have begun, in addition to a prediction's own `timeout_ms`.
        connections: requests at a time; others wait.
        retries: how often and how long failed requests are repeated. A request that may have had
            its effect is repeated only if doing it twice is harmless: reading, predicting, uploads
            without a condition, rollbacks to a named revision.
        headers: sent with every request.
        ca: for an https URL, a file of certificate authorities in PEM format that replaces those
            that httpx trusts.
        event_hooks, transport: httpx's own. Hooks see every attempt and may add an X-Request-ID.

    Raises:
        InvalidCall: an address, key or number that cannot be used.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        seconds: float = 60.0,
        connections: int = 16,
        retries: Retries | None = None,
        headers: Mapping[str, str] | None = None,
        ca: str | None = None,
        event_hooks: Hooks | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        url, api_key, ca = from_environment(url, api_key, ca)
        address = Address(url, api_key, headers or {}, seconds, connections, ca)
        self._address = address
        self._connections = connections
        self._transport = BlockingTransport(address, event_hooks, transport)
        via = "" if self._transport.proxy is None else str(self._transport.proxy)
        self._exchanger = Exchanger(url, retries or Retries(), via=via)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls raise Closed from now on. Closing twice is harmless."""
        self._transport.close()

    def predict(
        self,
        inputs: Text | Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Classify one text or pair, or a list of them, in one request: all are answered or none.

        With `adapters` each of them answers every input; the results of an input follow each other.

        Raises:
            ClientError: any of its tree, as from every method.
        """
        return self._call(operations.predict(inputs, adapter, options, adapters))

    def classify(
        self,
        inputs: Iterable[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str] | None = None,
        per_request: int = PER_REQUEST,
        in_flight: int = IN_FLIGHT,
        **options: Unpack[Options],
    ) -> Generator[Result, None, None]:
        """Classify any number of inputs, several requests at a time; results keep their order.

        Holds no more inputs than `in_flight` requests have, and yields the results that have
        arrived before it reads another input. Without `timeout_ms` a request has ten minutes.

        Args:
            adapters: each of them answers every input; the results of an input follow each other,
                and `Result.input` is its number in the call.
            per_request: answers of one request.
            in_flight: requests at a time.

        Raises:
            ClientError: after all results of earlier requests have been yielded; its `inputs.N`
                counts from the first input of the call.
        """
        check_sizes(
            inputs, per_request=per_request, in_flight=in_flight, connections=self._connections
        )
        patient: Options = {"timeout_ms": TIMEOUT_MS, **options}
        each = len(adapters) if adapters else 1
        chunks = chunks_of(inputs, per_request=per_request, each=each)
        return self._classified(chunks, in_flight, adapter, adapters, patient)

    def stream(
        self, inputs: Iterable[Text], adapter: str | None = None, **options: Unpack[Options]
    ) -> Generator[Result | Unanswered, None, None]:
        """Classify any number of inputs on one connection; results keep their order.

        For jobs: the service gives them a smaller share of the device than requests for which
        somebody waits. An input that cannot be answered has an `Unanswered` in its place, and the
        others go on. A lost connection is opened again, and what was not answered is sent again.
        Holds a few thousand inputs, or 8 MiB of them, and yields what has arrived before it reads
        another input. `timeout_ms` is of each input, from when the service has read it; without it
        the service takes ten minutes, and inputs that were not answered in time are sent again.

        Raises:
            ClientError: after all earlier results have been yielded.
        """
        check_many(inputs)
        params, headers = operations.stream_params(adapter, options)
        make = partial(
            Lines,
            [self._address.longer(STREAM_SECONDS)],
            params=params,
            headers=headers,
            retries=self._exchanger.retries,
            timeouts_final="timeout_ms" in options,
        )
        return self._streamed(inputs, Background(make))

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        adapter: str | None = None,
        *,
        label: str | None = None,
        top_n: int | None = None,
        truncate: bool = True,
        request_id: str | None = None,
        request_key: str | None = None,
    ) -> Ranking:
        """Sort documents by how well they fit a query, by an adapter for pairs.

        Args:
            adapter: `name` or `name@revision`; None: the service's default adapter.
            label: the one whose score is the order. None: the adapter's only one, or of two labels
                the one that the other denies; else the service refuses.
            top_n: so many of the best; None: all.
            truncate: False refuses a pair that is longer than the adapter reads.
            request_id, request_key: as options of `predict`.
        """
        return self._call(
            operations.rerank(
                query,
                documents,
                adapter,
                label=label,
                top_n=top_n,
                truncate=truncate,
                request_id=request_id,
                request_key=request_key,
            )
        )

    def embed(
        self,
        inputs: str | Sequence[str],
        *,
        dimensions: int | None = None,
        truncate: bool = True,
        request_id: str | None = None,
    ) -> Embeddings:
        """The vectors of a text or of a list of texts, each of length one: the mean of the frozen
        backbone's last states, without any adapter.

        Args:
            dimensions: the first ones only; None: all that the backbone has.
            truncate: False refuses a text that is longer than the backbone reads.
            request_id: as an option of `predict`.
        """
        return self._call(
            operations.embed(
                inputs, dimensions=dimensions, truncate=truncate, request_id=request_id
            )
        )

    def adapters(
        self, *, search: str = "", state: AdapterState | None = None
    ) -> list[AdapterSummary]:
        """All adapters by name, or some of them.

        Args:
            search: only names that contain each of these words.
            state: only adapters in this state.
        """
        return self._transport.run(operations.adapters(self._exchanger, search, state))

    def adapter(self, name: str) -> AdapterDetail:
        """One adapter: its spec, its revisions, and whether it can be served."""
        return self._call(operations.show(name))

    def upload(
        self,
        name: str,
        file: bytes | Path | str,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        force: bool = False,
        stage: bool = False,
        wait: Wait | None = None,
    ) -> Published:
        """Publish an adapter file, given as bytes or as a path, under a name.

        Args:
            if_match: only if this is the current revision; "*": only if the name exists.
            if_none_match: only if this is not the current revision; "*": only if the name is new.
            force: replace an adapter also by one with other labels or another task.
            stage: the current revision stays; `set_traffic` tries the new one.
            wait: for which replicas that share a store, as in every method that changes what is
                served: all (the default), one, none.

        Raises:
            OSError: the file cannot be read.
            Conflict: a condition does not hold.
            Rejected: 409, the labels or the task would change; `details` says how.
        """
        return self._call(
            operations.upload(
                name,
                file,
                if_match=if_match,
                if_none_match=if_none_match,
                force=force,
                stage=stage,
                wait=wait,
            )
        )

    def check(
        self,
        name: str,
        file: bytes | Path | str,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        force: bool = False,
        stage: bool = False,
    ) -> UploadReport:
        """What `upload` with the same arguments would come to: whether the service would accept
        the file, and what it would change. Nothing is stored.

        Raises:
            OSError: the file cannot be read.
            Conflict: a condition does not hold.
            Rejected: 409, the labels or the task would change, and this is not forced.
        """
        return self._call(
            operations.check(
                name,
                file,
                if_match=if_match,
                if_none_match=if_none_match,
                force=force,
                stage=stage,
            )
        )

    def download(self, name: str, revision: str | None = None) -> AdapterFile:
        """An adapter's file: the current revision, or the one that begins with these characters."""
        return self._call(operations.download(name, revision))

    def difference(
        self, name: str, before: str | None = None, after: str | None = None
    ) -> RevisionDifference:
        """What differs between two stored revisions, each by its first characters; None is the
        current one."""
        return self._call(operations.difference(name, before, after))

    def card(self, name: str, revision: str | None = None) -> Card:
        """The model card of a revision, by default the current one.

        Raises:
            NotFound: `type` is card_not_found: none was stored with this revision.
        """
        return self._call(operations.card(name, revision))

    def set_card(
        self, name: str, text: str, revision: str | None = None, *, if_match: str | None = None
    ) -> str:
        """Keep a model card with a revision, by default the current one, in place of the one that
        it had; returns the revision.

        Args:
            text: Markdown, at most 256 KiB.
            if_match: only if this is the current revision.
        """
        return self._call(operations.set_card(name, text, revision, if_match=if_match))

    def unload(self, name: str) -> None:
        """Stop serving an adapter until it is loaded or published again; the store keeps it. Of
        several replicas only the one that is asked does so."""
        self._call(operations.unload(name))

    def load(self, name: str) -> None:
        """Serve an unloaded adapter again, or read a stored one once more."""
        self._call(operations.load(name))

    def rollback(
        self,
        name: str,
        revision: str | None = None,
        *,
        if_match: str | None = None,
        wait: Wait | None = None,
    ) -> Published:
        """Serve the previous revision again, or the one that begins with these characters."""
        return self._call(operations.rollback(name, revision, if_match=if_match, wait=wait))

    def delete(self, name: str, *, if_match: str | None = None, wait: Wait | None = None) -> None:
        """Delete an adapter and all its revisions."""
        self._call(operations.delete(name, if_match=if_match, wait=wait))

    def delete_revision(
        self,
        name: str,
        revision: str,
        *,
        if_match: str | None = None,
        wait: Wait | None = None,
    ) -> None:
        """Delete one revision, which must not be the current one; also by its first characters."""
        self._call(operations.delete_revision(name, revision, if_match=if_match, wait=wait))

    def set_traffic(
        self,
        name: str,
        revision: str,
        percent: float,
        *,
        shadow: bool = False,
        rule: Rule | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
    ) -> TrafficDetail:
        """Let a second revision read some of an adapter's texts, or change how many.

        Args:
            revision: its first characters.
            percent: of the texts, from 0 to 100.
            shadow: it answers none of them, its answers are only compared.
            rule: when this ends by itself; None: the service's defaults.
            if_match: only if this is the current revision.
        """
        return self._call(
            operations.set_traffic(
                name, revision, percent, shadow=shadow, rule=rule, if_match=if_match, wait=wait
            )
        )

    def traffic(self, name: str) -> TrafficDetail:
        """How an adapter's texts are divided, or were last; what was seen, and why it ended."""
        return self._call(operations.traffic(name))

    def end_traffic(
        self, name: str, *, if_match: str | None = None, wait: Wait | None = None
    ) -> None:
        """Let the current revision read all texts again."""
        self._call(operations.end_traffic(name, if_match=if_match, wait=wait))

    def promote(
        self, name: str, *, if_match: str | None = None, wait: Wait | None = None
    ) -> Published:
        """Make the second revision, which reads some of the texts, the current one."""
        return self._call(operations.promote(name, if_match=if_match, wait=wait))

    def drift(self, name: str, revision: str | None = None) -> Drift:
        """How far an adapter's last texts are from those of its training.

        Args:
            revision: one that is tried, by its first characters; None: the current one.
        """
        return self._call(operations.drift(name, revision))

    def uncertain(self, name: str) -> tuple[UncertainText, ...]:
        """The texts of which an adapter is least certain; needs the scope `texts`."""
        return self._call(operations.uncertain(name))

    def uncertain_file(self, name: str, format: Literal["jsonl", "csv"]) -> bytes:
        """The same texts as a file: lines of JSON, or CSV with an empty column for the label."""
        return self._call(operations.uncertain_file(name, format))

    def forget_uncertain(self, name: str) -> None:
        """Have the service forget these texts."""
        self._call(operations.forget_uncertain(name))

    def health(self) -> Health:
        """Whether the service works; sent once."""
        return self._probe("/healthz")

    def ready(self) -> Health:
        """Whether the service accepts requests now, and why not; sent once."""
        return self._probe("/readyz")

    def metrics(self, names: Sequence[str] = ()) -> str:
        """The metrics with these names, by default all, in Prometheus' text format."""
        return self._call(operations.metrics(names))

    def _call(self, call: Call[T]) -> T:
        return self._transport.run(self._exchanger(call))

    def _probe(self, path: str) -> Health:
        exchange = replace(self._exchanger, retries=ONCE)(operations.probe(path))
        return self._transport.run(exchange)

    def _streamed(
        self, inputs: Iterable[Text], background: Background
    ) -> Generator[Result | Unanswered, None, None]:
        fault: Exception | None = None
        with background:
            for line in fault_last(map(operations.stream_line, inputs)):
                if isinstance(line, Exception):
                    fault = line
                    break
                while not background.put(line):
                    some = background.answers(or_room=True)
                    yield from map(operations.stream_answer, some)
                yield from map(operations.stream_answer, background.answers(wait=False))
            background.close()
            while answers := background.answers():
                yield from map(operations.stream_answer, answers)
        if fault is not None:
            raise fault

    def _classified(
        self,
        chunks: Iterator[Chunk | Exception],
        in_flight: int,
        adapter: str | None,
        adapters: Sequence[str] | None,
        options: Options,
    ) -> Generator[Result, None, None]:
        stopped = threading.Event()

        def pause(seconds: float) -> None:
            if stopped.wait(seconds):
                raise Closed("the caller stopped before this answer came")

        def predict(chunk: Chunk | Exception) -> Iterator[Result]:
            if isinstance(chunk, Exception):
                raise chunk
            try:
                call = operations.predict(chunk.inputs, adapter, options, adapters)
                answer = self._transport.run(self._exchanger(call), pause)
                return results_of(answer, chunk.first)
            except Refused as error:
                raise renumbered(error, chunk.first) from None

        pending: deque[Future[Iterator[Result]]] = deque()
        try:
            for chunk in chunks:
                pending.append(_in_thread(predict, chunk))
                while pending and (len(pending) == in_flight or pending[0].done()):
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            stopped.set()


def _in_thread(work: Callable[[Chunk | Exception], T], chunk: Chunk | Exception) -> "Future[T]":
    """Start a daemon thread: a request cannot be cancelled, and must not delay the exit."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(chunk))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="classify", daemon=True).start()
    return future
