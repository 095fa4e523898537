"""Both clients on the real service. They do the same, so most tests run with each."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from adapters.format.files import Adapter, serialize
from service.client import (
    Client,
    Closed,
    Conflict,
    Failed,
    Input,
    NotAllowed,
    NotFound,
    Rejected,
)
from tests.support.either_client import either
from tests.support.http_service import Brake, RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone

LABELS = ("ham", "spam")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        running.put("a", make_adapter(make_backbone()))
        running.put("b", make_adapter(make_backbone(), seed=1, labels=("x", "y", "z")))
        yield running


@pytest.fixture(params=["blocking", "awaited"])
def client(request: pytest.FixtureRequest, live: RunningService) -> Iterator[Client]:
    with either(request.param, live.url) as client:
        yield client


@pytest.fixture
def files() -> tuple[bytes, bytes]:
    return tuple(serialize(make_adapter(make_backbone(), seed=seed)) for seed in (11, 12))  # type: ignore[return-value]  # two


def revision_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_text_a_pair_and_a_list_are_answered_as_the_service_answers(
    live: RunningService, client: Client
) -> None:
    several: list[Any] = ["a", {"text": "b"}]
    for inputs in ("free win", {"text": "free", "text_pair": "win"}, several, [""]):
        raw = live.predict(adapter="a", inputs=inputs, explain=True, top_k=1)
        typed: Any = msgspec.convert(inputs, str | Input | list[str | Input])
        answer = client.predict(typed, "a", explain=True, top_k=1)
        mine: Any = msgspec.to_builtins(answer)
        assert _rounded(mine["results"]) == _rounded(raw["results"])
        assert set(mine["timings_ms"]) == set(raw["timings_ms"])


def _rounded(results: Any) -> Any:
    """Two requests meet other batches: sums in another order."""
    return [
        {
            key: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
            for key, value in result.items()
            if key not in ("scores", "explanation")
        }
        | {"words seen": [item["word"] for item in result["explanation"]["words"]]}
        for result in results
    ]


def test_each_input_may_have_an_adapter_and_an_id_of_its_own(
    live: RunningService, client: Client
) -> None:
    pinned = live.client.get("/v1/adapters/b").json()["revision"]
    inputs: list[str | Input] = [
        Input("free", id="1"),
        Input("free", adapter="b"),
        Input("free", adapter=f"b@{pinned[:8]}", id="3"),
        "free",
    ]
    answer = client.predict(inputs, "a", top_k=2)
    assert [item.adapter for item in answer] == ["a", "b", "b", "a"]
    assert [item.id for item in answer] == ["1", None, "3", None]
    assert len(answer) == 4
    assert answer[2].revision == pinned
    assert [score.label for score in answer[3].scores] == sorted(
        LABELS, key=lambda label: label != answer[3].label
    )


def test_a_text_that_is_too_long_is_truncated_or_refused(client: Client) -> None:
    long = "win " * 500
    assert client.predict(long, "a")[0].truncated
    with pytest.raises(Rejected, match=r"inputs\.0: 502 tokens"):
        client.predict([long], "a", truncate=False)


def test_adapters_are_uploaded_listed_shown_rolled_back_and_deleted(
    client: Client, files: tuple[bytes, bytes], tmp_path: Path
) -> None:
    one, two = files
    path = tmp_path / "two.safetensors"
    path.write_bytes(two)
    published = client.upload("mine", one, if_none_match="*")
    assert published.name == "mine"
    assert published.revision == revision_of(one)
    assert published.outcome == "created"
    assert client.upload("mine", one).outcome == "unchanged"
    assert client.upload("mine", path, if_match=published.revision).outcome == "replaced"
    assert client.upload("mine", str(path), if_match="*").outcome == "unchanged"
    assert [item.name for item in client.adapters()] == ["a", "b", "mine"]
    shown = client.adapter("mine")
    assert shown.revisions == (revision_of(two), revision_of(one))
    assert shown.labels == LABELS
    assert shown.spec is not None
    assert shown.spec["labels"] == list(LABELS)
    assert client.download("mine").data == two
    assert client.download("mine", revision_of(one)[:12]).data == one
    assert client.rollback("mine").revision == revision_of(one)
    assert client.rollback("mine", revision_of(two)[:10], if_match=revision_of(one)).changed
    client.delete("mine", if_match=revision_of(two))
    with pytest.raises(NotFound) as caught:
        client.adapter("mine")
    assert caught.value.details == ("a", "b")


def test_one_revision_is_deleted_and_another_meaning_is_forced(
    client: Client, files: tuple[bytes, bytes]
) -> None:
    one, two = files
    client.upload("mine", one)
    client.upload("mine", two)
    with pytest.raises(Rejected) as caught:
        client.delete_revision("mine", revision_of(two)[:12])
    assert caught.value.type == "revision_current"
    client.delete_revision("mine", revision_of(one)[:12], if_match=revision_of(two))
    assert client.adapter("mine").revisions == (revision_of(two),)
    other = serialize(make_adapter(make_backbone(), labels=("x", "y")))
    with pytest.raises(Rejected) as refused:
        client.upload("mine", other)
    assert refused.value.type == "replacement_not_forced"
    assert "labels added: x, y" in refused.value.details
    assert client.upload("mine", other, force=True).outcome == "replaced"
    client.delete("mine")


def test_an_unloaded_adapter_is_listed_and_shown(
    live: RunningService, client: Client, files: tuple[bytes, bytes]
) -> None:
    client.upload("idle", files[0])
    assert live.client.post("/v2/repository/models/idle/unload").status_code == 200
    assert {item.name: item.state for item in client.adapters()}["idle"] == "unloaded"
    assert client.adapter("idle").state == "unloaded"
    client.delete("idle")


def test_a_condition_that_does_not_hold_changes_nothing(
    client: Client, files: tuple[bytes, bytes]
) -> None:
    one, two = files
    published = client.upload("held", one)
    for refused in (
        lambda: client.upload("held", two, if_match=revision_of(two)),
        lambda: client.upload("held", two, if_none_match="*"),
        lambda: client.upload("new", two, if_match="*"),
        lambda: client.delete("held", if_match=revision_of(two)),
    ):
        with pytest.raises(Conflict) as caught:
            refused()
        assert caught.value.type == "revision_conflict"
    assert client.adapter("held").revision == published.revision
    client.delete("held")


def test_a_refusal_is_an_error_with_the_services_message(client: Client) -> None:
    with pytest.raises(NotFound, match="no adapter is named 'c'") as caught:
        client.predict("x", "c", request_id="my-own.id:7")
    assert caught.value.request_id == "my-own.id:7"
    assert (caught.value.status, caught.value.type) == (404, "adapter_not_found")
    with pytest.raises(NotFound, match="revision"):
        client.rollback("a", "77")
    with pytest.raises(Rejected) as faulty:
        client.upload("junk", b"no adapter")
    assert faulty.value.type == "adapter_invalid"
    with pytest.raises(Rejected, match="top_k"):
        client.predict("x", "a", top_k=0)
    with pytest.raises(Rejected, match="missing"):
        client.predict("x")
    with pytest.raises(Rejected) as large:
        client.predict(["x"] * 2000, "a")
    assert (large.value.status, large.value.type) == (413, "too_large")
    assert [adapter.name for adapter in client.adapters()] == ["a", "b"]


def test_a_missed_deadline_is_a_failure(tmp_path: Path, adapter: Adapter) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load) as live, Client(live.url) as client:
        live.put("a", adapter)
        brake.on()
        with pytest.raises(Failed) as caught:
            client.predict("free", "a", timeout_ms=100)
        brake.off()
    assert (caught.value.status, caught.value.type) == (504, "deadline_exceeded")


def test_probes_and_metrics_answer(client: Client) -> None:
    assert client.health().ok
    ready = client.ready()
    assert (ready.status, ready.reason) == ("ok", None)
    assert ready.details["waiting_tokens"] == 0
    assert "idspam_requests_total" in client.metrics()
    some = client.metrics(["idspam_waiting_tokens", "idspam_build_info"])
    assert {line.split("{")[0].split()[0] for line in some.splitlines() if line[0] != "#"} == {
        "idspam_waiting_tokens",
        "idspam_build_info",
    }


def test_many_threads_use_a_client_until_it_is_closed(live: RunningService) -> None:
    with Client(live.url, connections=3) as client:
        labels: list[str] = []

        def ask() -> None:
            labels.extend(client.predict("free", "a")[0].label for _ in range(5))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(labels) == 60
    client.close()
    with pytest.raises(Closed):
        client.predict("free", "a")


def test_the_callers_hooks_see_every_request_and_may_name_it(live: RunningService) -> None:
    seen: list[str] = []

    def name(request: httpx.Request) -> None:
        request.headers["x-request-id"] = f"trace-{len(seen)}"

    def keep(response: httpx.Response) -> None:
        seen.append(response.headers["x-request-id"])

    with Client(live.url, event_hooks={"request": [name], "response": [keep]}) as client:
        client.predict("free", "a")
        client.ready()
    assert seen == ["trace-0", "trace-1"]


def test_a_key_gives_access(tmp_path: Path, adapter: Adapter) -> None:
    data = serialize(adapter)
    with serve(tmp_path, API_KEYS="user", ADMIN_KEYS="admin") as closed:
        with Client(closed.url) as nobody, pytest.raises(NotAllowed) as caught:
            nobody.adapters()
        assert (caught.value.status, caught.value.type) == (401, "unauthorized")
        with Client(closed.url, api_key="admin") as admin:
            admin.upload("a", data)
        with Client(closed.url, api_key="user") as user:
            assert user.predict("free", "a")[0].label in LABELS
            with pytest.raises(NotAllowed) as forbidden:
                user.delete("a")
        assert forbidden.value.type == "forbidden"
