"""Reranking, vectors, cards, lists and revisions through both clients, on a service in one process
and on one with workers."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from service.client import Client, Input, InvalidCall, NotFound, Rejected
from tests.support.either_client import either
from tests.support.pooling import mean_pooled
from tests.support.service_process import ReadyService, ready_service
from tests.support.tiny_models import make_adapter, save_backbone

pytestmark = pytest.mark.slow

QUERY = "is my card good"
DOCUMENTS = ["free win now", "the card is bad", "", "a good card"]
SIZE = 32
LONG = "win " * 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"), hidden_size=SIZE)


@pytest.fixture(scope="module", params=[0, 2], ids=["one process", "two workers"])
def service(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReadyService]:
    saved = load_backbone(str(folder), device="cpu")
    with (
        ready_service(
            folder,
            tmp_path_factory.mktemp("s"),
            workers=request.param,
            MAX_INPUTS="8",
            DEFAULT_ADAPTER="pairs",
        ) as running,
        Client(running.url) as client,
    ):
        pairs = make_adapter(saved, seed=7, labels=("not_fitting", "fitting"), max_length=32)
        client.upload("pairs", serialize(pairs))
        client.upload("topics", serialize(make_adapter(saved, seed=1, labels=("x", "y", "z"))))
        for seed in (2, 3):
            client.upload("mail", serialize(make_adapter(saved, seed=seed)))
        yield running


@pytest.fixture(params=["blocking", "awaited"])
def client(request: pytest.FixtureRequest, service: ReadyService) -> Iterator[Client]:
    with either(request.param, service.url) as client:
        yield client


def test_documents_come_sorted_with_the_scores_of_their_pairs(client: Client) -> None:
    ranking = client.rerank(QUERY, DOCUMENTS, "pairs")
    pairs = [Input(QUERY, document) for document in DOCUMENTS]
    scores = [
        next(score.score for score in result.scores if score.label == "fitting")
        for result in client.predict(pairs, "pairs")
    ]
    assert sorted(item.index for item in ranking) == list(range(len(DOCUMENTS)))
    assert [item.score for item in ranking] == sorted(
        (item.score for item in ranking), reverse=True
    )
    for item in ranking:
        assert item.score == pytest.approx(scores[item.index], abs=1e-5)
    assert ranking.tokens > len(DOCUMENTS)
    best = client.rerank(QUERY, DOCUMENTS, top_n=1)
    assert (len(best), best[0].index) == (1, ranking[0].index)
    turned = client.rerank(QUERY, DOCUMENTS, "pairs", label="not_fitting")
    assert turned[0].index == ranking[-1].index


def test_a_ranking_that_cannot_be_made_is_refused(client: Client) -> None:
    with pytest.raises(Rejected, match="by which label are texts sorted"):
        client.rerank(QUERY, DOCUMENTS, "topics")
    with pytest.raises(Rejected, match="no such label"):
        client.rerank(QUERY, DOCUMENTS, "pairs", label="none")
    with pytest.raises(NotFound, match="no adapter is named 'none'"):
        client.rerank(QUERY, DOCUMENTS, "none")
    assert len(client.rerank(QUERY, [LONG], "pairs")) == 1
    with pytest.raises(Rejected, match="tokens"):
        client.rerank(QUERY, [LONG], "pairs", truncate=False)
    with pytest.raises(Rejected, match="at most 8"):
        client.rerank(QUERY, ["x"] * 9, "pairs")
    with pytest.raises(InvalidCall, match="documents: one text"):
        client.rerank(QUERY, "one", "pairs")


def test_vectors_are_those_of_transformers(client: Client, folder: Path) -> None:
    texts = ["free win now", "", "the card is bad, call you"]
    found = client.embed(texts)
    for vector, expected in zip(found, mean_pooled(folder, texts), strict=True):
        assert vector == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.tokens > 0
    assert found.model
    alone = client.embed("free win now")
    assert len(alone) == 1
    assert alone[0] == pytest.approx(found[0], abs=1e-5)
    short = client.embed(texts, dimensions=4)
    assert [len(vector) for vector in short] == [4, 4, 4]
    assert sum(value * value for value in short[0]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(Rejected, match=f"the backbone has {SIZE}"):
        client.embed(texts, dimensions=SIZE + 1)
    with pytest.raises(Rejected, match="tokens"):
        client.embed(LONG, truncate=False)
    with pytest.raises(InvalidCall, match=r"inputs\.1: int"):
        client.embed(["a", 1])  # type: ignore[list-item]  # what a caller may do


def test_lists_are_searched_and_filtered(client: Client) -> None:
    assert [item.name for item in client.adapters()] == ["mail", "pairs", "topics"]
    assert [item.name for item in client.adapters(search="i")] == ["mail", "pairs", "topics"]
    assert [item.name for item in client.adapters(search="a i")] == ["mail", "pairs"]
    assert client.adapters(search="none") == []
    client.unload("topics")
    try:
        assert [item.name for item in client.adapters(state="unloaded")] == ["topics"]
        assert [item.name for item in client.adapters(state="ready")] == ["mail", "pairs"]
        with pytest.raises(Rejected, match="unloaded"):
            client.predict("x", "topics")
    finally:
        client.load("topics")
    assert client.predict("x", "topics")[0].adapter == "topics"
    with pytest.raises(NotFound, match="no adapter is named 'none'"):
        client.unload("none")
    with pytest.raises(NotFound):
        client.load("none")
    with pytest.raises(Rejected, match="state"):
        client.adapters(state="asleep")  # type: ignore[arg-type]  # what a caller may do


def test_revisions_have_their_history_and_their_differences(client: Client) -> None:
    shown = client.adapter("mail")
    assert [version.revision for version in shown.versions] == list(shown.revisions)
    assert [event.what for event in shown.events] == ["publish", "publish"]
    assert all(version.size > 0 and version.stored for version in shown.versions)
    now, before = shown.revisions
    found = client.difference("mail", before[:12])
    assert (found.before, found.after) == (before, now)
    assert found.difference.labels.added == ()
    assert client.difference("mail").before == client.difference("mail").after == now
    with pytest.raises(NotFound):
        client.difference("mail", "77")


def test_a_card_is_kept_with_its_revision(client: Client) -> None:
    now, before = client.adapter("mail").revisions
    assert client.set_card("mail", "# Old ü", before[:12]) == before
    assert client.set_card("mail", "# New", if_match=now) == now
    assert client.card("mail").text == "# New"
    old = client.card("mail", before[:12])
    assert (old.revision, old.text) == (before, "# Old ü")
    with pytest.raises(NotFound) as missing:
        client.card("pairs")
    assert missing.value.type == "card_not_found"
    with pytest.raises(Rejected) as large:
        client.set_card("mail", "x" * (2**18 + 1))
    assert (large.value.status, large.value.type) == (413, "too_large")
    with pytest.raises(InvalidCall, match="UTF-8"):
        client.set_card("mail", "\ud800")


def test_several_adapters_answer_any_number_of_inputs(client: Client) -> None:
    """`MAX_INPUTS` is 8 here, so each request holds few inputs; numbers are of the whole call."""
    texts = [f"free win {number}" for number in range(11)]
    inputs: list[str | Input] = [
        *texts,
        Input("one adapter", adapter="topics"),
        Input("two", adapters=("mail", "topics")),
    ]
    found = list(client.classify(inputs, adapters=["mail", "topics", "pairs"], per_request=8))
    asked = [(at, name) for at in range(11) for name in ("mail", "topics", "pairs")]
    asked += [(11, "topics"), (12, "mail"), (12, "topics")]
    assert [(result.input, result.adapter) for result in found] == asked
    (alone,) = client.predict(texts[7], "topics")
    assert found[7 * 3 + 1].score == pytest.approx(alone.score, abs=1e-5)
    # A single input may have more answers than `per_request`.
    assert len(list(client.classify(["x", "y"], adapters=["mail", "pairs"], per_request=1))) == 4
    with pytest.raises(NotFound, match="none"):
        list(client.classify(texts, adapters=["mail", "none"], per_request=8))


def test_errors_of_other_protocols_keep_their_status_and_words(service: ReadyService) -> None:
    assert httpx.post(f"{service.url}/v2/repository/models/none/unload").json()["error"]
    with Client(service.url) as client, pytest.raises(NotFound) as caught:
        client.unload("none")
    assert (caught.value.status, caught.value.type) == (404, "")
    assert "no adapter is named 'none'" in caught.value.message
