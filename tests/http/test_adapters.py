"""/v1/adapters: publishing, conditions, paging, rollback, deletion, and files that are refused."""

import base64
import hashlib
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapters.format.files import serialize
from adapters.format.store import AdapterStore, verified_file
from service.http.openapi.schemas import AdapterDetail, AdapterList, PublishedAdapter
from tests.support.hostile_files import with_spec
from tests.support.http_service import Brake, RunningService, error_of, serve, until
from tests.support.tiny_models import make_adapter, make_backbone

LIMIT = 200_000


@pytest.fixture
def live(tmp_path: Path) -> Iterator[RunningService]:
    with serve(tmp_path / "adapters", MAX_UPLOAD_BYTES=str(LIMIT)) as running:
        yield running


def data(seed: int = 0, **fields: Any) -> bytes:
    return serialize(make_adapter(make_backbone(), seed=seed, **fields))


def put(live: RunningService, name: str, content: bytes, **headers: str) -> httpx.Response:
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return live.client.put(f"/v1/adapters/{name}", content=content, headers=headers)


def etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()}"'


def test_put_creates_then_changes_nothing_then_replaces(live: RunningService) -> None:
    first, second = data(1), data(2)
    expected = ((first, 201, True, True), (first, 200, False, False), (second, 200, False, True))
    for content, status, created, changed in expected:
        response = put(live, "a", content)
        assert response.status_code == status
        published = PublishedAdapter.model_validate(response.json())
        assert published.revision == hashlib.sha256(content).hexdigest()
        assert (published.created, published.changed) == (created, changed)
        assert response.headers["etag"] == etag(content)
        assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] == published.revision
    for outcome in ("created", "unchanged", "replaced"):
        assert live.metric("idspam_uploads_total", outcome=outcome) == 1


def test_multipart_form_publishes_the_same(live: RunningService) -> None:
    response = live.client.post("/v1/adapters", data={"name": "a"}, files={"file": data(1)})
    assert response.status_code == 201
    assert response.headers["etag"] == etag(data(1))
    assert put(live, "a", data(1)).json()["changed"] is False


def test_forms_that_are_not_one_name_and_one_file_are_refused(live: RunningService) -> None:
    def post(**parts: Any) -> httpx.Response:
        return live.client.post("/v1/adapters", **parts)

    nothing = post(data={"other": "x"}, files={"upload": b"x"})
    assert nothing.status_code == 422
    assert [item.split(":")[0] for item in error_of(nothing)["details"]] == [
        "form.other", "form.upload", "form.name", "form.file",
    ]  # fmt: skip
    options = post(data={"name": "a", "dry_run": "true"}, files={"file": data()})
    assert error_of(options)["details"] == [
        "form.dry_run: no such field: it is a parameter of the URL, `?dry_run=...`"
    ]
    twice = post(data={"name": ["a", "b"]}, files={"file": data()})
    assert error_of(twice)["details"] == ["form.name: given twice"]
    assert post(data={"name": "a" * 100_000}, files={"file": data()}).status_code == 400
    assert post(data={"name": "a", "file": "text"}, files={}).status_code == 415
    assert post(files={"name": b"a", "file": b"b"}).status_code == 400
    assert post(data={"name": "A B"}, files={"file": data()}).status_code == 422
    assert post(content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    garbled = {"Content-Type": "multipart/form-data; boundary=b"}
    assert post(content=b"--b\r\nnonsense", headers=garbled).status_code == 422
    assert post(content=b"nonsense", headers=garbled).status_code == 400
    assert post(data={"name": "a"}, files={"file": b"x" * (LIMIT + 1)}).status_code == 413
    assert live.client.get("/v1/adapters").json()["adapters"] == []


@pytest.mark.slow
def test_a_form_in_another_charset_than_utf8_is_refused(live: RunningService) -> None:
    for charset in ("undefined", "raw_unicode_escape", "utf-7", "idna", "no-such", "latin-1"):
        for name in (rb"\ud800", b"a", b"\xff"):
            response = form(live, name, f"; charset={charset}")
            assert response.status_code == 400
            message = error_of(response)["message"]
            assert message == f"the form's charset is {charset!r}, expected utf-8"


def test_a_form_in_utf8_is_read_whatever_its_name_is(live: RunningService) -> None:
    assert form(live, b"a", "; charset=UTF-8").status_code == 201
    for name in (rb"\ud800", b"\xff", b"\xed\xa0\x80", b""):
        for query in ({}, {"dry_run": "true"}):
            refused = form(live, name, "", query)
            assert refused.status_code == 422
            assert error_of(refused)["type"] == "adapter_name_invalid"


def form(
    live: RunningService, name: bytes, parameters: str, query: dict[str, str] | None = None
) -> httpx.Response:
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + name,
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + data(1),
        b"--b--\r\n",
    ]
    kind = {"Content-Type": f"multipart/form-data; boundary=b{parameters}"}
    return live.client.post(
        "/v1/adapters", content=b"\r\n".join(parts), headers=kind, params=query or {}
    )


def test_if_match_and_if_none_match_compare_and_swap(live: RunningService) -> None:
    first, second = data(1), data(2)
    assert put(live, "a", first, If_Match="*").status_code == 412
    assert put(live, "a", first, If_Match=etag(first)).status_code == 412
    assert put(live, "a", first, If_None_Match="*").status_code == 201
    for headers in (
        {"If_None_Match": "*"},
        {"If_None_Match": etag(first)},
        {"If_Match": etag(second)},
        {"If_Match": f"W/{etag(first)}"},
        {"If_Match": ""},
    ):
        response = put(live, "a", second, **headers)
        assert response.status_code == 412, headers
        assert error_of(response)["type"] == "revision_conflict"
    assert live.service.catalog.entry("a").current == hashlib.sha256(first).hexdigest()
    assert put(live, "a", second, If_Match=f"{etag(data(9))}, {etag(first)}").status_code == 200
    assert put(live, "a", first, If_Match="*").status_code == 200
    stale = {"If-Match": etag(second)}
    assert live.client.delete("/v1/adapters/a", headers=stale).status_code == 412
    assert live.client.post("/v1/adapters/a/rollback", json={}, headers=stale).status_code == 412
    assert (
        live.client.delete("/v1/adapters/a", headers={"If-Match": etag(first)}).status_code == 204
    )


def test_a_condition_that_fails_is_told_before_the_body_is_read(live: RunningService) -> None:
    put(live, "a", data(1))
    response = put(live, "a", b"x" * (LIMIT * 2), If_None_Match="*")
    assert response.status_code == 412


def refused_files() -> list[Any]:
    adapter = make_adapter(make_backbone())
    whole = serialize(adapter)
    archive = io.BytesIO()
    torch.save({"weights": torch.zeros(2)}, archive)
    broken = bytearray(whole)
    broken[-4:] = b"\x00\x00\xc0\x7f"
    foreign = serialize(make_adapter(make_backbone(seed=1)))
    header = int.from_bytes(whole[:8], "little")
    surrogate = whole[:8] + whole[8:].replace(b"ham", b"\\ud8", 1)
    return [
        pytest.param(b"", 422, "shorter than", id="empty"),
        pytest.param(pickle.dumps({"a": 1}), 422, "pickle", id="pickle"),
        pytest.param(archive.getvalue(), 422, "pickle", id="torch.save"),
        pytest.param(whole[:-10], 422, "", id="truncated tensors"),
        pytest.param(whole[: 8 + header // 2], 422, "truncated", id="truncated header"),
        pytest.param(whole + b"x", 422, "", id="trailing byte"),
        pytest.param(bytes(broken), 422, "finite", id="not finite"),
        pytest.param(surrogate, 422, "", id="broken labels"),
        pytest.param(b'{"a": 1}', 422, "JSON", id="JSON"),
        pytest.param(b"\xff" * 5000, 422, "claims", id="noise"),
        pytest.param(with_spec(adapter, labels=["ham", "sp\0am"]), 422, r"sp\x00am", id="NUL"),
        pytest.param(with_spec(adapter, format_version=True), 422, "format_version", id="version"),
        pytest.param(foreign, 409, "backbone", id="another backbone"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("content", "status", "fault"), refused_files())
def test_a_refused_file_names_its_faults_and_leaves_the_served_one(
    live: RunningService, content: bytes, status: int, fault: str
) -> None:
    served = put(live, "a", data(1)).json()["revision"]
    response = put(live, "a", content)
    assert response.status_code == status, response.text
    error = error_of(response)
    assert error["type"] == {409: "adapter_incompatible", 422: "adapter_invalid"}[status]
    assert error["details"]
    assert any(fault in item for item in error["details"]), error["details"]
    assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] == served
    assert put(live, "new", content).status_code == status
    assert live.client.get("/v1/adapters/new").status_code == 404
    assert live.metric("idspam_uploads_total", outcome="refused") == 2


@pytest.mark.slow
def test_a_service_starts_beside_files_that_no_upload_would_have_let_in(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    store.put("good", data(1))
    contents = [parameter.values[0] for parameter in refused_files()]
    for index, content in enumerate(contents):
        store.put(f"bad{index}", content)
    with serve(tmp_path / "adapters") as live:
        assert live.predict(adapter="good", inputs="x")["results"][0]["label"]
        listed = live.client.get("/v1/adapters").json()["adapters"]
        assert len(listed) == len(contents) + 1
        for index in range(len(contents)):
            question = {"adapter": f"bad{index}", "inputs": "x"}
            refused = error_of(live.client.post("/v1/predict", json=question))
            assert refused["type"] in {
                "adapter_damaged",
                "adapter_incompatible",
                "adapter_load_failed",
                "inference_failed",
            }
            assert refused["message"]
            # A good file takes its place.
            assert put(live, f"bad{index}", data(2)).status_code == 200
        assert live.client.get("/readyz").status_code == 200


def test_too_large_files_are_413_with_and_without_announced_length(live: RunningService) -> None:
    assert put(live, "a", b"x" * (LIMIT + 1)).status_code == 413
    chunks = (b"x" * 10_000 for _ in range(LIMIT // 10_000 + 5))
    response = live.client.put("/v1/adapters/a", content=chunks)
    assert response.status_code == 413
    assert error_of(response)["type"] == "too_large"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "-a", "a" * 65, "a%20b", ".a", "a%00", "%C3%A9", "a@b", "~"])
def test_bad_names_are_422_and_never_a_path(live: RunningService, name: str) -> None:
    response = put(live, name, data())
    assert response.status_code == 422
    assert error_of(response)["type"] == "adapter_name_invalid"
    assert all(item.name.startswith(".") for item in live.adapter_dir.iterdir())


def test_list_pages_by_name_and_shows_what_the_files_say(live: RunningService) -> None:
    for index in range(5):
        put(live, f"n{index}", data(index))
    pages, cursor = [], None
    while True:
        query: dict[str, Any] = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = AdapterList.model_validate(live.client.get("/v1/adapters", params=query).json())
        pages.append([item.name for item in page.adapters])
        if (cursor := page.next_cursor) is None:
            break
    assert pages == [["n0", "n1"], ["n2", "n3"], ["n4"]]
    (item,) = live.client.get("/v1/adapters", params={"limit": 1}).json()["adapters"]
    assert item == {
        "name": "n0",
        "revision": hashlib.sha256(data(0)).hexdigest(),
        "state": "ready",
        "reason": None,
        "labels": ["ham", "spam"],
        "method": "idspam",
        "backbone": "tiny-bert-0",
        "prompt_length": 3,
        "created": None,
        "size": len(data(0)),
    }
    for query in (
        {"limit": 0},
        {"limit": 1001},
        {"limit": "x"},
        {"cursor": "c" * 65},
        {"search": "s" * 65},
    ):
        assert live.client.get("/v1/adapters", params=query).status_code == 422


def test_a_search_lists_the_names_that_contain_it_by_pages_like_all_others(
    live: RunningService,
) -> None:
    for name in ("mail-spam", "sms-spam", "spam", "tone"):
        put(live, name, data())

    def names(**query: str) -> list[str]:
        page = live.client.get("/v1/adapters", params=query).json()
        return [item["name"] for item in page["adapters"]]

    assert names(search="spam") == ["mail-spam", "sms-spam", "spam"]
    assert names(search="S-Spam") == ["sms-spam"]
    assert names(search="spam", limit="1", cursor="mail-spam") == ["sms-spam"]
    assert names(search="*") == names(search="../") == []
    assert names(search="") == names()
    last = live.client.get("/v1/adapters", params={"search": "spam", "limit": 3}).json()
    assert last["next_cursor"] is None


def test_show_names_spec_and_revisions_the_current_one_first(live: RunningService) -> None:
    first, second = data(1), data(2, prompt_length=5)
    put(live, "a", first)
    put(live, "a", second)
    response = live.client.get("/v1/adapters/a")
    detail = AdapterDetail.model_validate(response.json())
    assert response.headers["etag"] == etag(second)
    assert [f'"{item}"' for item in detail.revisions] == [etag(second), etag(first)]
    assert detail.spec is not None
    assert detail.spec["prompt"]["length"] == 5
    missing = live.client.get("/v1/adapters/b")
    assert missing.status_code == 404
    assert error_of(missing)["details"] == ["a"]


def test_download_gives_the_uploaded_bytes_of_any_revision(live: RunningService) -> None:
    first, second = data(1), data(2)
    put(live, "a", first)
    put(live, "a", second)
    response = live.client.get("/v1/adapters/a/file")
    assert response.content == second
    assert response.headers["etag"] == etag(second)
    name = f"a-{hashlib.sha256(second).hexdigest()[:12]}.safetensors"
    assert response.headers["content-disposition"] == f'attachment; filename="{name}"'
    old = live.client.get("/v1/adapters/a/file", params={"revision": etag(first)[1:9]})
    assert old.content == first
    unchanged = live.client.get("/v1/adapters/a/file", headers={"If-None-Match": etag(second)})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert live.client.get("/v1/adapters/a/file", params={"revision": "zz"}).status_code == 404
    live.service.catalog.path("a")[1].unlink()
    gone = live.client.get("/v1/adapters/a/file")
    assert gone.status_code == 500
    assert error_of(gone)["type"] == "adapter_damaged"


def test_a_file_that_is_deleted_once_it_was_hashed_is_still_sent(
    live: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(live, "a", data(1))

    def hashed_then_deleted(root: Path, name: str, revision: str) -> Path:
        path = verified_file(root, name, revision)
        assert httpx.delete(f"{live.url}/v1/adapters/a").status_code == 204
        until(lambda: not path.exists())
        return path

    monkeypatch.setattr("service.http.adapters.verified_file", hashed_then_deleted)
    part = live.client.get("/v1/adapters/a/file", headers={"Range": "bytes=10-99"})
    assert (part.status_code, part.content) == (206, data(1)[10:100])
    assert part.headers["etag"] == etag(data(1))
    assert live.client.get("/v1/adapters/a/file").status_code == 404


def test_a_range_beyond_the_file_is_an_error_of_the_services_shape(live: RunningService) -> None:
    put(live, "a", data(1))
    whole, path = data(1), "/v1/adapters/a/file"
    answer = live.client.get(path, headers={"Range": f"bytes={len(whole)}-"})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(whole)}"
    error = error_of(answer)
    assert error["type"] == "range_not_satisfiable"
    assert error["message"] == f"Range is bytes={len(whole)}-, the file has {len(whole)} bytes"
    for ignored in ("bits=0-1", "bytes=x", "bytes=5-2", "bytes"):
        answer = live.client.get(path, headers={"Range": ignored})
        assert (answer.status_code, answer.content) == (200, whole)


def flip(live: RunningService, revision: str | None = None) -> None:
    """Change one byte of a stored file, which keeps its size."""
    path = live.service.catalog.path("a", revision)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_rotted_file_is_never_sent_and_marked_as_damaged(live: RunningService) -> None:
    put(live, "a", data(1))
    flip(live)
    for response in (
        live.client.get("/v1/adapters/a/file"),
        live.client.get("/v1/adapters/a/file"),
    ):
        assert response.status_code == 500
        assert error_of(response)["type"] == "adapter_damaged"
        assert "etag" not in response.headers
    assert live.client.head("/v1/adapters/a/file").status_code == 500
    assert live.client.get("/v1/adapters/a").json()["state"] == "damaged"
    refused = live.client.post("/v1/predict", json={"adapter": "a", "inputs": "x"})
    assert error_of(refused)["type"] == "adapter_damaged"
    # Uploading the bytes again repairs it.
    assert put(live, "a", data(1)).status_code == 200
    assert live.client.get("/v1/adapters/a/file").content == data(1)
    assert live.client.get("/v1/adapters/a").json()["state"] == "ready"


def test_a_rotted_old_revision_leaves_the_current_one(live: RunningService) -> None:
    old = put(live, "a", data(1)).json()["revision"]
    put(live, "a", data(2))
    flip(live, old)
    response = live.client.get("/v1/adapters/a/file", params={"revision": old[:8]})
    assert error_of(response)["type"] == "adapter_damaged"
    assert live.client.get("/v1/adapters/a/file").content == data(2)
    live.predict(adapter="a", inputs="x")
    pinned = live.client.post("/v1/predict", json={"adapter": f"a@{old[:8]}", "inputs": "x"})
    assert error_of(pinned)["type"] == "adapter_damaged"


def test_a_rotted_file_of_an_unloaded_adapter_is_not_sent(live: RunningService) -> None:
    put(live, "a", data(1))
    assert live.client.post("/v2/repository/models/a/unload").status_code == 200
    assert live.client.get("/v1/adapters/a/file").content == data(1)
    flip(live)
    assert error_of(live.client.get("/v1/adapters/a/file"))["type"] == "adapter_damaged"


def test_rollback_serves_the_previous_or_the_named_revision(live: RunningService) -> None:
    files = [data(seed) for seed in (1, 2, 3)]
    revisions = [put(live, "a", content).json()["revision"] for content in files]

    def roll_back(revision: str | None) -> str:
        response = live.client.post("/v1/adapters/a/rollback", json={"revision": revision})
        assert response.status_code == 200, response.text
        assert response.headers["etag"] == f'"{response.json()["revision"]}"'
        answered = live.predict(adapter="a", inputs="x")["results"][0]["revision"]
        assert answered == response.json()["revision"]
        return str(answered)

    assert roll_back(None) == revisions[1]
    assert roll_back(None) == revisions[2]
    assert roll_back(revisions[0][:8]) == revisions[0]
    pinned = live.predict(adapter=f"a@{revisions[2][:8]}", inputs="x")["results"][0]
    assert pinned["revision"] == revisions[2]


def test_rollback_refuses_what_is_not_there(live: RunningService) -> None:
    put(live, "a", data(1))
    for body, status in (
        ({}, 404),
        ({"revision": "ffffffff"}, 404),
        ({"revision": ""}, 422),
        ({"revision": "../.."}, 422),
        ({"revision": 1}, 422),
        ({"rev": None}, 422),
    ):
        response = live.client.post("/v1/adapters/a/rollback", json=body)
        assert response.status_code == status, body
        error_of(response)
    assert live.client.post("/v1/adapters/b/rollback", json={}).status_code == 404


@pytest.mark.slow
def test_delete_forgets_the_name_and_its_series(live: RunningService) -> None:
    put(live, "a", data(1))
    live.predict(adapter="a", inputs="x")
    labelled = [labels for _, labels in live.series() if ("adapter", "a") in labels]
    assert len(labelled) == 6  # two labels and failures, each with its moment of creation
    assert live.client.delete("/v1/adapters/a").status_code == 204
    assert live.client.delete("/v1/adapters/a").status_code == 404
    assert live.client.post("/v1/predict", json={"adapter": "a", "inputs": "x"}).status_code == 404
    assert not [labels for _, labels in live.series() if ("adapter", "a") in labels]
    assert live.metric("idspam_tier_adapters", tier="stored") == 0
    assert put(live, "a", data(1)).status_code == 201


# One revision.


def test_one_revision_is_deleted_and_the_others_stay(live: RunningService) -> None:
    one, two, three = (put(live, "a", data(seed)).json()["revision"] for seed in (1, 2, 3))
    path = "/v1/adapters/a/revisions"
    stale = {"If-Match": f'"{one}"'}
    assert live.client.delete(f"{path}/{two[:9]}", headers=stale).status_code == 412
    assert live.client.delete(f"{path}/{two[:9]}").status_code == 204
    assert live.client.get("/v1/adapters/a").json()["revisions"] == [three, one]
    assert not live.adapter_dir.joinpath("a", f"{two}.safetensors").exists()
    gone = live.client.post("/v1/predict", json={"adapter": f"a@{two}", "inputs": "x"})
    assert error_of(gone)["type"] == "revision_not_found"
    for reference, revision in (("a", three), (f"a@{one}", one)):
        assert live.predict(adapter=reference, inputs="x")["results"][0]["revision"] == revision
    assert live.client.delete(f"{path}/{two}").status_code == 404
    assert live.client.delete(f"/v1/adapters/b/revisions/{two}").status_code == 404
    current = live.client.delete(f"{path}/{three}")
    assert current.status_code == 409
    assert error_of(current)["type"] == "revision_current"
    assert live.client.post("/v1/adapters/a/rollback", json={}).json()["revision"] == one


def test_deleting_a_revision_of_an_unloaded_adapter_does_not_load_it(live: RunningService) -> None:
    old = put(live, "a", data(1)).json()["revision"]
    put(live, "a", data(2))
    live.client.post("/v2/repository/models/a/unload")
    assert live.client.delete(f"/v1/adapters/a/revisions/{old}").status_code == 204
    assert live.client.get("/v1/adapters/a").json()["state"] == "unloaded"


def test_a_limit_of_kept_revisions_removes_the_oldest(tmp_path: Path) -> None:
    with serve(tmp_path, KEPT_REVISIONS="2") as live:
        revisions = [put(live, "a", data(seed)).json()["revision"] for seed in range(4)]
        shown = live.client.get("/v1/adapters/a").json()["revisions"]
        assert shown == [revisions[3], revisions[2]]
        assert len(list(tmp_path.glob("a/*.safetensors"))) == 2
        gone = live.client.post("/v1/predict", json={"adapter": f"a@{revisions[0]}", "inputs": "x"})
        assert error_of(gone)["type"] == "revision_not_found"


def test_a_revision_that_a_request_holds_outlives_the_limit(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, KEPT_REVISIONS="1") as live:
        old = put(live, "a", data(1)).json()["revision"]
        live.predict(adapter="a", inputs="x")
        brake.on()
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(live.predict, adapter=f"a@{old}", inputs="x")
            until(lambda: live.service.engine.in_use("a") == {old})  # type: ignore[attr-defined]
            publishing = pool.submit(put, live, "a", data(2))
            brake.off()
            assert held.result()["results"][0]["revision"] == old
            assert publishing.result().status_code == 200


# Another meaning.

OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"labels": ("ham", "spam", "scam")}, "labels added: scam"),
    ({"labels": ("ham", "phishing")}, "labels removed: spam"),
    ({"labels": ("spam", "ham")}, "labels in another order: spam, ham"),
    ({"activation": "sigmoid"}, "activation softmax -> sigmoid"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "change"), OTHERS)
def test_replacing_by_another_meaning_must_be_forced(
    live: RunningService, fields: dict[str, Any], change: str
) -> None:
    first, other = data(1), data(2, **fields)
    put(live, "a", first)

    def form(query: str = "", **headers: str) -> httpx.Response:
        parts: dict[str, Any] = {"data": {"name": "a"}, "files": {"file": other}}
        return live.client.post(f"/v1/adapters{query}", headers=headers, **parts)

    def load(query: str = "") -> httpx.Response:
        body = {"parameters": {"file:1/a": base64.b64encode(other).decode()}}
        return live.client.post(f"/v2/repository/models/a/load{query}", json=body)

    for refused in (put(live, "a", other), put(live, "a", other, If_Match="*"), form()):
        assert refused.status_code == 409
        error = error_of(refused)
        assert error["type"] == "replacement_not_forced"
        assert change in error["details"]
        assert "force=true" in error["message"]
    assert load().status_code == 409
    assert change in load().json()["error"]
    assert live.client.get("/v1/adapters/a").json()["revision"] == etag(first)[1:-1]
    ways: list[Callable[[], httpx.Response]] = [
        lambda: live.client.put("/v1/adapters/a?force=true", content=other),
        lambda: put(live, "a", other, If_Match=etag(first)),
        lambda: form("?force=true"),
        lambda: form(**{"If-Match": etag(first)}),
        lambda: load("?force=true"),
    ]
    for forced in ways:
        assert forced().status_code == 200
        assert live.client.get("/v1/adapters/a").json()["revision"] == etag(other)[1:-1]
        assert live.client.post("/v1/adapters/a/rollback", json={}).status_code == 200
    assert live.client.put("/v1/adapters/a?force=perhaps", content=other).status_code == 422


def test_a_name_that_is_new_or_cannot_be_read_needs_no_force(live: RunningService) -> None:
    put(live, "a", data(1))
    assert put(live, "b", data(2, labels=("x", "y"))).status_code == 201
    path = live.service.catalog.path("a")[1]
    path.write_bytes(b"rotten")
    assert live.client.post("/v2/repository/models/a/load").status_code == 500
    assert put(live, "a", data(2, labels=("x", "y"))).status_code == 200
