"""?dry_run=true: an upload's whole check and what it would change, with nothing stored."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.difference import difference
from adapters.format.files import serialize
from adapters.format.spec import Provenance
from service.http.openapi.schemas import PublishedAdapter, UploadReport
from tests.support.hostile_files import with_spec
from tests.support.http_service import RunningService, error_of, serve
from tests.support.key_files import bearer, write_keys
from tests.support.replicas import Cluster
from tests.support.tiny_models import make_adapter, make_backbone

DRY = {"dry_run": "true"}
LIMIT = 200_000


@pytest.fixture(scope="module", params=["a folder", "a shared store"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningService, Path]]:
    """A service on each kind of store, and the folder with all of its files."""
    root = tmp_path_factory.mktemp("store")
    if request.param == "a folder":
        with serve(root / "adapters", MAX_UPLOAD_BYTES=str(LIMIT)) as service:
            yield service, root
    else:
        with Cluster(root).replica("a", MAX_UPLOAD_BYTES=str(LIMIT)) as service:
            yield service, root


@pytest.fixture
def live(running: tuple[RunningService, Path]) -> Iterator[RunningService]:
    """The service, with no adapter before and after."""
    service, _ = running
    yield service
    for adapter in service.client.get("/v1/adapters").json()["adapters"]:
        service.client.delete(f"/v1/adapters/{adapter['name']}")


@pytest.fixture
def root(running: tuple[RunningService, Path]) -> Path:
    """Where every file of the service is."""
    return running[1]


def data(seed: int = 0, **fields: Any) -> bytes:
    return serialize(make_adapter(make_backbone(), seed=seed, **fields))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def dry(
    live: RunningService,
    name: str,
    content: bytes,
    headers: dict[str, str] | None = None,
    **query: str,
) -> httpx.Response:
    return live.client.put(
        f"/v1/adapters/{name}", content=content, params=DRY | query, headers=headers
    )


def report(live: RunningService, name: str, content: bytes, **query: str) -> UploadReport:
    response = dry(live, name, content, None, **query)
    assert response.status_code == 200, response.text
    return UploadReport.model_validate(response.json())


def files(root: Path) -> set[str]:
    """Everything below a folder but for logs, states of replicas, locks and images."""
    volatile = (".audit", "replicas", "snapshots", ".locks", ".images")
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not set(path.relative_to(root).parts) & set(volatile)
    }


def test_a_new_name_is_accepted_and_nothing_is_stored(live: RunningService, root: Path) -> None:
    before = files(root)
    content = data(1)
    found = report(live, "a", content)
    assert found.accepted
    assert found.error is None
    assert (found.serving, found.difference) == (None, None)
    assert found.adapter.revision == sha256(content)
    assert found.adapter.size == len(content)
    assert found.adapter.labels == ["ham", "spam"]
    assert found.adapter.method == "idspam"
    others = ["the disk", "the other replicas"] if (root / "shared").exists() else ["the disk"]
    for told, about in zip(found.unchecked, others, strict=True):
        assert about in told
    assert live.client.get("/v1/adapters/a").status_code == 404
    assert files(root) == before


def test_a_replacement_says_what_it_changes_and_the_served_revision_stays(
    live: RunningService, root: Path
) -> None:
    old = make_adapter(make_backbone(), seed=1, provenance=Provenance(metrics={"accuracy": 0.9}))
    new = make_adapter(
        make_backbone(), seed=2, prompt_length=5, provenance=Provenance(metrics={"accuracy": 0.95})
    )
    served = live.put("a", old)
    before = files(root)
    response = dry(live, "a", serialize(new))
    assert response.headers["ETag"] == f'"{served}"'
    found = UploadReport.model_validate(response.json())
    assert found.accepted
    assert found.serving == served
    expected = difference(
        old.spec, new.spec, size_before=len(serialize(old)), size_after=len(serialize(new))
    )
    assert found.difference is not None
    shown = {item.field: (item.before, item.after) for item in found.difference.fields}
    assert shown == {item.field: (item.before, item.after) for item in expected.fields}
    assert shown["prompt.length"] == (3, 5)
    assert [(item.field, item.before, item.after) for item in found.difference.figures] == [
        ("accuracy", 0.9, 0.95)
    ]
    assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] == served
    assert live.client.get("/v1/adapters/a").json()["revisions"] == [served]
    assert files(root) == before


def test_the_served_bytes_again_differ_in_nothing(live: RunningService) -> None:
    served = live.put("a", make_adapter(make_backbone(), seed=1))
    found = report(live, "a", data(1))
    assert found.accepted
    assert found.adapter.revision == found.serving == served
    assert found.difference is not None
    assert found.difference.fields == []


def refused() -> dict[str, bytes]:
    whole = data(7)
    broken = bytearray(whole)
    broken[-4:] = b"\x00\x00\xc0\x7f"
    return {
        "no adapter": b"hello, I am a text file",
        "empty": b"",
        "JSON": b'{"labels": ["a"]}',
        "cut in its header": whole[:400],
        "cut in its tensors": whole[:-100],
        "not finite": bytes(broken),
        "an unknown field": with_spec(make_adapter(make_backbone()), colour="red"),
        "another backbone": serialize(make_adapter(make_backbone(seed=1))),
        "other labels": data(3, labels=("eggs", "ham")),
        "other order": data(3, labels=("spam", "ham")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", refused())
def test_a_refused_file_has_the_error_of_its_upload(
    live: RunningService, root: Path, name: str
) -> None:
    live.put("a", make_adapter(make_backbone(), seed=1))
    before = files(root)
    content = refused()[name]
    found = report(live, "a", content)
    assert files(root) == before
    upload = live.client.put("/v1/adapters/a", content=content)
    assert not found.accepted
    assert found.error is not None
    assert found.error.status == upload.status_code
    assert found.error.model_dump(exclude={"status"}) == error_of(upload)
    # What it declares is shown as far as it can be read.
    is_readable = (
        name in ("cut in its tensors", "not finite", "another backbone") or "other" in name
    )
    assert (found.adapter.spec is not None) == is_readable
    assert (found.difference is not None) == is_readable
    if name == "another backbone":
        assert found.adapter.backbone == "tiny-bert-1"


def test_another_meaning_is_accepted_as_it_is_by_an_upload(live: RunningService) -> None:
    served = live.put("a", make_adapter(make_backbone(), seed=1))
    other = data(3, labels=("eggs", "ham"))
    for query, headers in (
        ({"force": "true"}, None),
        ({"stage": "true"}, None),
        ({}, {"If-Match": f'"{served}"'}),
    ):
        answer = UploadReport.model_validate(dry(live, "a", other, headers, **query).json())
        assert answer.accepted, (query, headers)
        assert answer.difference is not None
        assert answer.difference.labels.model_dump() == {
            "added": ["eggs"],
            "removed": ["spam"],
            "reordered": False,
        }
    assert not UploadReport.model_validate(dry(live, "a", other, {"If-Match": "*"}).json()).accepted


def test_what_is_not_about_the_file_is_answered_as_by_an_upload(live: RunningService) -> None:
    live.put("a", make_adapter(make_backbone(), seed=1))
    cases: list[tuple[str, bytes, dict[str, str], dict[str, str], int]] = [
        ("a", data(2), {"If-Match": f'"{"0" * 64}"'}, {}, 412),
        ("a", data(2), {"If-None-Match": "*"}, {}, 412),
        ("new", data(2), {}, {"stage": "true"}, 404),
        ("A", data(2), {}, {}, 422),
        ("a", b"x" * (LIMIT + 1), {}, {}, 413),
        ("a", data(2), {"Content-Encoding": "gzip"}, {}, 415),
        ("a", data(2), {}, {"force": "perhaps"}, 422),
    ]
    for name, content, headers, query, status in cases:
        rehearsed = dry(live, name, content, headers, **query)
        upload = live.client.put(
            f"/v1/adapters/{name}", content=content, headers=headers, params=query
        )
        assert rehearsed.status_code == upload.status_code == status, rehearsed.text
        assert error_of(rehearsed) == error_of(upload)
    assert dry(live, "a", data(2), dry_run="maybe").status_code == 422


def test_a_form_can_be_a_dry_run(live: RunningService) -> None:
    form: dict[str, Any] = {"data": {"name": "a"}, "files": {"file": data(1)}}
    response = live.client.post("/v1/adapters", params=DRY, **form)
    assert UploadReport.model_validate(response.json()).accepted
    assert live.client.get("/v1/adapters/a").status_code == 404
    stored = live.client.post("/v1/adapters", params={"dry_run": "false"}, **form)
    assert PublishedAdapter.model_validate(stored.json()).created


@pytest.mark.slow
def test_a_dry_run_needs_the_key_of_the_upload(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys",
        reader={"scopes": ["adapters:read", "predict"]},
        writer={"scopes": ["adapters:write"]},
        only_b={"scopes": ["adapters:write"], "adapters": ["b"]},
    )
    with serve(tmp_path / "adapters", KEYS_FILE=str(tmp_path / "keys")) as live:

        def status(name: str | None) -> int:
            headers = {} if name is None else bearer(keys[name])
            return dry(live, "a", data(1), headers).status_code

        assert status(None) == 401
        assert status("reader") == 403
        assert status("only-b") == 403
        assert status("writer") == 200
        form: dict[str, Any] = {"data": {"name": "a"}, "files": {"file": data(1)}}
        answer = live.client.post(
            "/v1/adapters", params=DRY, headers=bearer(keys["only-b"]), **form
        )
        assert answer.status_code == 403
        assert files(tmp_path / "adapters") <= {".service.lock", ".engine.lock"}
