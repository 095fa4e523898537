"""Many inputs and busy services, on the real service with both clients."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.format.files import Adapter
from service.client import AsyncClient, Busy, Client, Input, InvalidCall, Rejected, Result, Retries
from tests.support.either_client import either
from tests.support.http_service import Brake, RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        running.put("a", make_adapter(make_backbone()))
        yield running


@pytest.fixture(params=["blocking", "awaited"])
def client(request: pytest.FixtureRequest, live: RunningService) -> Iterator[Client]:
    with either(request.param, live.url) as client:
        yield client


@pytest.mark.slow
def test_any_number_of_inputs_is_answered_in_order(client: Client) -> None:
    inputs = (Input("free " * (number % 9), id=str(number)) for number in range(500))
    results = list(client.classify(inputs, "a", per_request=7, in_flight=5, top_k=1))
    assert [item.id for item in results] == [str(number) for number in range(500)]
    assert list(client.classify([], "a")) == []


def test_an_error_among_many_inputs_names_its_place_among_all(client: Client) -> None:
    inputs = ["ok"] * 40 + ["win " * 500] + ["ok"] * 40
    with pytest.raises(Rejected, match=r"inputs\.40: 502 tokens"):
        list(client.classify(inputs, "a", per_request=16, truncate=False))


@pytest.mark.parametrize("kind", ["blocking", "awaited"])
@pytest.mark.parametrize("bad", [5, KeyError("mine")])
async def test_results_before_a_fault_of_the_inputs_come_first(
    live: RunningService, kind: str, bad: Any
) -> None:
    def inputs() -> Iterator[Any]:
        yield from ["ok"] * 45
        if isinstance(bad, Exception):
            raise bad
        yield bad

    results: list[Result] = []

    async def ask() -> None:
        if kind == "blocking":
            with Client(live.url) as client:
                results.extend(client.classify(inputs(), "a", per_request=10))
        else:
            async with AsyncClient(live.url) as other:
                async for result in other.classify(inputs(), "a", per_request=10):
                    results.append(result)

    with pytest.raises(KeyError if isinstance(bad, Exception) else InvalidCall):
        await ask()
    assert len(results) == 45


def test_results_before_an_error_come_first(live: RunningService) -> None:
    results = []

    def ask(client: Client) -> None:
        inputs = ["ok"] * 40 + ["win " * 500]
        for result in client.classify(inputs, "a", per_request=10, truncate=False):
            results.append(result)

    with Client(live.url) as client, pytest.raises(Rejected):
        ask(client)
    assert len(results) == 40


@pytest.mark.slow
def test_no_more_inputs_are_held_than_the_requests_in_flight_have(live: RunningService) -> None:
    read = yielded = most = 0

    def inputs() -> Iterator[str]:
        nonlocal read, most
        for _ in range(2000):
            read += 1
            most = max(most, read - yielded)
            yield "free"

    with Client(live.url) as client:
        for _ in client.classify(inputs(), "a", per_request=10, in_flight=4):
            yielded += 1
    assert yielded == 2000
    assert most <= 50


async def test_inputs_of_an_async_iterable_are_answered_too(live: RunningService) -> None:
    async def inputs() -> AsyncIterator[str]:
        for number in range(100):
            await asyncio.sleep(0)
            yield f"free {number}"

    async with AsyncClient(live.url) as client:
        answers = [result async for result in client.classify(inputs(), "a", per_request=9)]
    assert len(answers) == 100


def test_a_single_text_is_not_read_as_an_iterable_of_letters(client: Client) -> None:
    for wrong in ("text", Input("text")):
        with pytest.raises(InvalidCall, match="one text"):
            client.classify(wrong, "a")  # type: ignore[arg-type]  # what the test is about
    for numbers in ({"per_request": 0}, {"in_flight": 0}, {"in_flight": 17}):
        with pytest.raises(InvalidCall):
            client.classify(["x"], "a", **numbers)  # type: ignore[arg-type]  # likewise


@pytest.mark.slow
def test_an_overloaded_service_is_retried_when_it_says(tmp_path: Path, adapter: Adapter) -> None:
    brake = Brake()
    statuses: list[int] = []

    def keep(response: httpx.Response) -> None:
        statuses.append(response.status_code)
        if response.status_code == 429:
            assert response.headers["retry-after"]
            brake.off()

    with serve(tmp_path, load=brake.load, MAX_WAITING_TOKENS="64") as live:
        live.put("a", adapter)
        brake.on()
        with Client(live.url, event_hooks={"response": [keep]}) as client:
            results = list(client.classify(["free win now"] * 60, "a", per_request=4, in_flight=12))
    assert len(results) == 60
    assert 429 in statuses


@pytest.mark.slow
def test_a_lasting_overload_ends_with_the_services_error(tmp_path: Path, adapter: Adapter) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, MAX_WAITING_TOKENS="64") as live:
        live.put("a", adapter)
        brake.on()
        refused: list[Busy] = []

        def ask(client: Client) -> None:
            try:
                client.predict(["free win now"] * 4, "a")
            except Busy as error:
                refused.append(error)
                brake.off()

        with Client(live.url, retries=Retries(seconds=0.9)) as client:
            threads = [threading.Thread(target=ask, args=(client,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
    assert refused
    for error in refused:
        assert (error.status, error.type) == (429, "overloaded")
        assert error.retry_after is not None


@pytest.mark.slow
def test_the_client_waits_for_a_service_that_is_loading(tmp_path: Path) -> None:
    loading = threading.Event()

    def load() -> Any:
        assert loading.wait(20)
        return make_backbone()

    statuses: list[int] = []

    def keep(response: httpx.Response) -> None:
        statuses.append(response.status_code)
        loading.set()

    with (
        serve(tmp_path, load=load, wait=False) as live,
        Client(live.url, event_hooks={"response": [keep]}) as client,
    ):
        ready = client.ready()
        assert (ready.status, bool(ready.reason)) == ("unavailable", True)
        statuses.clear()
        loading.clear()
        assert client.adapters() == []
        assert statuses == [503, 200]
