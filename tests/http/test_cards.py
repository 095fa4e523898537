"""/v1/adapters/{name}/card: Markdown that is kept with a revision and goes with it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.format.files import serialize
from service.catalog.entry import MAX_CARD_BYTES
from tests.support.http_service import RunningService, error_of, serve
from tests.support.key_files import bearer, write_keys
from tests.support.replicas import Cluster
from tests.support.tiny_models import make_adapter, make_backbone

MARKDOWN = {"Content-Type": "text/markdown"}
CARD = "# A card\n\n<script>alert(1)</script> and ümlauts\n"


@pytest.fixture(scope="module", params=["a folder", "a shared store"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    root = tmp_path_factory.mktemp("store")
    if request.param == "a folder":
        with serve(root / "adapters", KEPT_REVISIONS="2") as service:
            yield service
    else:
        with Cluster(root).replica("a", KEPT_REVISIONS="2") as service:
            yield service


@pytest.fixture
def live(running: RunningService) -> Iterator[RunningService]:
    """The service, with no adapter before and after."""
    yield running
    running.client.delete("/v1/adapters/a")


def put(live: RunningService, card: str | bytes, **query: str) -> httpx.Response:
    content = card.encode() if isinstance(card, str) else card
    return live.client.put("/v1/adapters/a/card", content=content, headers=MARKDOWN, params=query)


def get(live: RunningService, **query: str) -> httpx.Response:
    return live.client.get("/v1/adapters/a/card", params=query)


@pytest.mark.slow
def test_a_card_is_kept_with_its_revision_and_comes_back_as_it_was(live: RunningService) -> None:
    first = live.put("a", make_adapter(make_backbone(), seed=1))
    assert error_of(get(live))["type"] == "card_not_found"
    stored = put(live, CARD)
    assert stored.status_code == 204
    assert stored.headers["ETag"] == f'"{first}"'
    shown = get(live)
    assert shown.text == CARD
    assert shown.headers["Content-Type"] == "text/markdown; charset=utf-8"
    assert shown.headers["X-Content-Type-Options"] == "nosniff"
    second = live.put("a", make_adapter(make_backbone(), seed=2))
    # The new revision has none yet; the old one's is still there.
    assert get(live).status_code == 404
    assert put(live, "# Two", revision=second[:8]).status_code == 204
    assert (get(live).text, get(live, revision=first[:8]).text) == ("# Two", CARD)
    assert put(live, "", revision=first).status_code == 204
    assert get(live, revision=first).text == ""


def test_a_card_goes_with_its_revision(live: RunningService) -> None:
    first = live.put("a", make_adapter(make_backbone(), seed=1))
    put(live, CARD)
    for seed in (2, 3):
        live.put("a", make_adapter(make_backbone(), seed=seed))
    assert error_of(get(live, revision=first))["type"] == "revision_not_found"
    assert not list(live.adapter_dir.glob("a/*.md"))


def test_names_with_the_same_file_have_cards_of_their_own(live: RunningService) -> None:
    for name in ("a", "b"):
        live.put(name, make_adapter(make_backbone(), seed=1))
    put(live, CARD)
    other = "/v1/adapters/b/card"
    assert live.client.get(other).status_code == 404
    assert live.client.put(other, content="of b", headers=MARKDOWN).status_code == 204
    assert (get(live).text, live.client.get(other).text) == (CARD, "of b")
    for name in ("a", "b"):
        assert live.client.delete(f"/v1/adapters/{name}").status_code == 204
    live.put("a", make_adapter(make_backbone(), seed=1))
    assert get(live).status_code == 404


def test_bad_cards_and_names_have_one_clear_error(live: RunningService) -> None:
    revision = live.put("a", make_adapter(make_backbone(), seed=1))

    def typed(response: httpx.Response) -> tuple[int, str]:
        return response.status_code, error_of(response)["type"]

    assert typed(put(live, b"\xff\xfe")) == (400, "malformed_request")
    assert typed(put(live, b"x" * (MAX_CARD_BYTES + 1))) == (413, "too_large")
    assert put(live, b"x" * MAX_CARD_BYTES).status_code == 204
    assert typed(put(live, CARD, revision="77")) == (404, "revision_not_found")
    assert typed(put(live, CARD, revision="x" * 65)) == (422, "invalid_request")
    for headers in ({"Content-Type": "application/json"}, {}):
        answer = live.client.put("/v1/adapters/a/card", content=b"{}", headers=headers)
        assert typed(answer) == (415, "unsupported_media_type")
    stale = MARKDOWN | {"If-Match": f'"{"0" * 64}"'}
    answer = live.client.put("/v1/adapters/a/card", content=b"x", headers=stale)
    assert typed(answer) == (412, "revision_conflict")
    fresh = MARKDOWN | {"If-Match": f'"{revision}"'}
    assert live.client.put("/v1/adapters/a/card", content=b"x", headers=fresh).status_code == 204
    assert typed(live.client.get("/v1/adapters/b/card")) == (404, "adapter_not_found")
    assert typed(live.client.put("/v1/adapters/b/card", content=b"", headers=MARKDOWN)) == (
        404,
        "adapter_not_found",
    )


@pytest.mark.slow
def test_a_card_is_seen_on_every_replica(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    with cluster.replica("a") as one, cluster.replica("b") as two:
        one.put("a", make_adapter(make_backbone(), seed=1))
        assert put(one, CARD).status_code == 204
        assert get(two).text == CARD


@pytest.mark.slow
def test_the_zoo_brings_its_cards(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "a.safetensors").write_bytes(serialize(make_adapter(make_backbone(), seed=1)))
    (zoo / "a.md").write_text(CARD)
    with serve(tmp_path / "adapters", ZOO_DIR=str(zoo)) as live:
        assert get(live).text == CARD
    with serve(tmp_path / "adapters") as live:
        assert get(live).text == CARD


@pytest.mark.slow
def test_reading_and_writing_a_card_need_the_scopes_of_adapters(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys",
        reader={"scopes": ["adapters:read"]},
        writer={"scopes": ["adapters:write"]},
    )
    with serve(tmp_path / "adapters", KEYS_FILE=str(tmp_path / "keys")) as live:
        writer, reader = bearer(keys["writer"]), bearer(keys["reader"])
        content = serialize(make_adapter(make_backbone(), seed=1))
        live.client.put("/v1/adapters/a", content=content, headers=writer)
        path = "/v1/adapters/a/card"
        for headers, status in ((reader, 403), ({}, 401), (writer, 204)):
            assert (
                live.client.put(path, content=b"x", headers=MARKDOWN | headers).status_code
                == status
            )
        for headers, status in ((writer, 403), ({}, 401), (reader, 200)):
            assert live.client.get(path, headers=headers).status_code == status
