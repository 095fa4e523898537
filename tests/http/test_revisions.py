"""What GET /v1/adapters/{name} tells of revisions: when they came, who did what, what differs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.format.files import serialize
from service.http.openapi.schemas import AdapterDetail, RevisionDifference
from tests.support.http_service import RunningService, error_of, serve, until
from tests.support.key_files import bearer, write_keys
from tests.support.replicas import Cluster
from tests.support.tiny_models import make_adapter, make_backbone


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tokens by name; `file` is the path of the file."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    return {"file": str(file), **write_keys(file, ann={}, bob={})}


@pytest.fixture(scope="module", params=["a folder", "a shared store"])
def running(
    keys: dict[str, str],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningService]:
    root = tmp_path_factory.mktemp("store")
    if request.param == "a folder":
        with serve(root / "adapters", KEYS_FILE=keys["file"], KEPT_REVISIONS="3") as service:
            yield service
    else:
        with Cluster(root).replica("a", KEYS_FILE=keys["file"], KEPT_REVISIONS="3") as service:
            yield service


@pytest.fixture
def live(running: RunningService, keys: dict[str, str]) -> Iterator[RunningService]:
    """The service, with no adapter before and after."""
    yield running
    running.client.delete("/v1/adapters/a", headers=bearer(keys["ann"]))


def put(live: RunningService, token: str, seed: int, **query: str) -> str:
    response = live.client.put(
        "/v1/adapters/a",
        content=serialize(make_adapter(make_backbone(), seed=seed)),
        headers=bearer(token),
        params=query,
    )
    assert response.status_code in (200, 201), response.text
    return str(response.json()["revision"])


def detail(live: RunningService, token: str) -> AdapterDetail:
    response = live.client.get("/v1/adapters/a", headers=bearer(token))
    return AdapterDetail.model_validate(response.json())


def told(found: AdapterDetail) -> list[tuple[str, str, str | None]]:
    return [(event.what, event.revision, event.who) for event in found.events]


@pytest.mark.slow
def test_who_did_what_to_which_revision_is_told_newest_first(
    live: RunningService, keys: dict[str, str]
) -> None:
    ann, bob = keys["ann"], keys["bob"]
    first, second = put(live, ann, 1), put(live, bob, 2)
    put(live, ann, 2)  # The same bytes again: nothing happens.
    live.client.post("/v1/adapters/a/rollback", json={}, headers=bearer(ann))
    third = put(live, bob, 3, stage="true")
    live.client.post("/v1/adapters/a/traffic/promote", headers=bearer(ann))
    gone = live.client.delete(f"/v1/adapters/a/revisions/{second}", headers=bearer(bob))
    assert gone.status_code == 204
    found = detail(live, ann)
    assert told(found) == [
        ("delete_revision", second, "bob"),
        ("promote", third, "ann"),
        ("stage", third, "bob"),
        ("rollback", first, "ann"),
        ("publish", second, "bob"),
        ("publish", first, "ann"),
    ]
    assert [event.at for event in found.events] == sorted(
        (event.at for event in found.events), reverse=True
    )
    assert [(item.revision, item.who) for item in found.versions] == [
        (third, "bob"),
        (first, "ann"),
    ]
    assert [item.revision for item in found.versions] == found.revisions
    assert all(item.size > 0 and item.method == "idspam" for item in found.versions)


def test_a_change_that_is_refused_is_no_event(live: RunningService, keys: dict[str, str]) -> None:
    put(live, keys["ann"], 1)
    bob = bearer(keys["bob"])
    refused = [
        live.client.put("/v1/adapters/a", content=b"x", headers=bob),
        live.client.post("/v1/adapters/a/rollback", json={}, headers=bob),
        live.client.delete("/v1/adapters/a/revisions/77", headers=bob),
    ]
    assert [response.status_code for response in refused] == [422, 404, 404]
    assert [event.what for event in detail(live, keys["ann"]).events] == ["publish"]


def test_the_events_of_a_deleted_name_go_with_it(
    live: RunningService, keys: dict[str, str]
) -> None:
    put(live, keys["ann"], 1)
    live.client.delete("/v1/adapters/a", headers=bearer(keys["ann"]))
    revision = put(live, keys["bob"], 1)
    assert told(detail(live, keys["ann"])) == [("publish", revision, "bob")]


@pytest.mark.slow
def test_events_are_bounded_and_a_stored_revision_keeps_its_uploader(
    live: RunningService, keys: dict[str, str]
) -> None:
    first, second = put(live, keys["ann"], 1), put(live, keys["bob"], 2)
    for _ in range(25):
        live.client.post("/v1/adapters/a/rollback", json={}, headers=bearer(keys["bob"]))
    found = detail(live, keys["ann"])
    assert len(found.events) == 22
    assert {item.revision: item.who for item in found.versions} == {first: "ann", second: "bob"}


@pytest.mark.slow
def test_events_outlive_a_restart_and_a_damaged_file_of_them_harms_nothing(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    with serve(root) as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
    with serve(root) as live:
        events = AdapterDetail.model_validate(live.client.get("/v1/adapters/a").json()).events
        # Without keys nobody has a name.
        assert [(event.what, event.who) for event in events] == [("publish", None)]
    for damage in (b"[", b'[{"at":"","what":"eat","revision":"","who":""}]'):
        (root / "a" / "events").write_bytes(damage)
        with serve(root) as live:
            assert live.client.get("/v1/adapters/a").json()["events"] == []
            assert live.predict(adapter="a", inputs="x")["results"]


@pytest.mark.slow
def test_a_second_replica_tells_the_same(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    with cluster.replica("a") as one, cluster.replica("b") as two:
        for seed in (1, 2):
            one.put("a", make_adapter(make_backbone(), seed=seed))
        two.client.post("/v1/adapters/a/rollback", json={})
        shown = [live.client.get("/v1/adapters/a").json() for live in (one, two)]
        assert shown[0]["events"] == shown[1]["events"]
        assert [event["what"] for event in shown[0]["events"]] == ["rollback", "publish", "publish"]
        assert shown[0]["versions"] == shown[1]["versions"]


def test_two_stored_revisions_are_compared(live: RunningService, keys: dict[str, str]) -> None:
    headers = bearer(keys["ann"])
    first = put(live, keys["ann"], 1)
    longer = serialize(make_adapter(make_backbone(), seed=2, prompt_length=9))
    second = live.client.put("/v1/adapters/a", content=longer, headers=headers).json()["revision"]

    def compared(**query: str) -> RevisionDifference:
        response = live.client.get("/v1/adapters/a/difference", params=query, headers=headers)
        assert response.status_code == 200, response.text
        return RevisionDifference.model_validate(response.json())

    found = compared(before=first[:8])
    assert (found.before, found.after) == (first, second)
    changed = {item.field: (item.before, item.after) for item in found.difference.fields}
    assert changed["prompt.length"] == (3, 9)
    back = compared(after=first[:8])
    assert (back.before, back.after) == (second, first)
    assert compared().difference.fields == []
    for query, status in (
        ({"before": "77"}, 404),
        ({"before": ""}, 404),
        ({"after": "x" * 65}, 422),
    ):
        response = live.client.get("/v1/adapters/a/difference", params=query, headers=headers)
        assert response.status_code == status
        assert error_of(response)["type"]


@pytest.mark.slow
def test_lists_are_searched_filtered_and_counted_by_the_service(tmp_path: Path) -> None:
    with serve(tmp_path / "adapters") as live:
        content = serialize(make_adapter(make_backbone(), seed=1))
        names = [f"{kind}-{number}" for kind in ("mail", "chat") for number in range(5)]
        for name in names:
            live.client.put(f"/v1/adapters/{name}", content=content)
        live.client.post("/v2/repository/models/mail-3/unload")

        def page(**query: Any) -> tuple[list[str], int, str | None]:
            shown = live.client.get("/v1/adapters", params=query).json()
            return (
                [item["name"] for item in shown["adapters"]],
                shown["total"],
                shown["next_cursor"],
            )

        assert page()[1] == 10
        assert page(search="mail", limit=2) == (["mail-0", "mail-1"], 5, "mail-1")
        assert page(search="mail", limit=2, cursor="mail-3") == (["mail-4"], 5, None)
        assert page(search=" 3  MAIL ") == (["mail-3"], 1, None)
        assert page(search="nothing") == ([], 0, None)
        assert page(state="unloaded") == (["mail-3"], 1, None)
        assert page(search="chat", state="unloaded") == ([], 0, None)
        until(lambda: page(state="ready")[1] == 9)
        assert live.client.get("/v1/adapters", params={"state": "asleep"}).status_code == 422
        assert live.client.get("/v1/adapters", params={"search": "x" * 65}).status_code == 422


@pytest.mark.slow
def test_some_of_the_metrics_are_written_without_the_others(tmp_path: Path) -> None:
    with serve(tmp_path / "adapters") as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        live.predict(adapter="a", inputs="x")
        whole = live.client.get("/metrics").text
        some = live.client.get(
            "/metrics", params={"name[]": ["idspam_batch_rows", "idspam_predictions_total"]}
        )
        assert some.status_code == 200
        lines = some.text.splitlines()
        assert set(lines) < set(whole.splitlines())
        assert {line.split("{")[0].split()[0] for line in lines if line[0] != "#"} == {
            "idspam_batch_rows_bucket",
            "idspam_batch_rows_sum",
            "idspam_batch_rows_count",
            "idspam_batch_rows_created",
            "idspam_predictions_total",
            "idspam_predictions_created",
        } & {line.split("{")[0].split()[0] for line in whole.splitlines() if line[0] != "#"}
        nothing = live.client.get("/metrics", params={"name[]": "no_such_metric"})
        assert nothing.text.strip() == ""
