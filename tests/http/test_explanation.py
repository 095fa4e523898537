"""What answers say about themselves, over HTTP: the words of their texts, and what each did."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, serialize
from adapters.words import Word
from service.http.explanation import Place, first_words
from service.http.openapi.schemas import Explanation
from tests.support.http_service import RunningService, error_of, serve
from tests.support.tiny_models import make_adapter, make_backbone

LABELS = ("ham", "spam", "other")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), MAX_HIDDEN_WORDS="40") as running:
        backbone = make_backbone()
        running.put("a", plain(backbone))
        running.put("short", make_adapter(backbone, seed=4, max_length=8))
        running.put("tags", make_adapter(backbone, seed=3, labels=LABELS, activation="sigmoid"))
        yield running


def plain(backbone: Backbone) -> Adapter:
    return make_adapter(backbone, seed=1, labels=LABELS)


def explained(live: RunningService, inputs: Any, kind: Any = True, **body: Any) -> dict[str, Any]:
    """The first result; its explanation has the documented shape and its words are slices."""
    asked = {"adapter": "a", "inputs": inputs, "explain": kind} | body
    result = live.predict(**asked)["results"][0]
    Explanation.model_validate(result["explanation"])
    (first, *_) = inputs if isinstance(inputs, list) else [inputs]
    texts = {"text": first} if isinstance(first, str) else first
    for word in result["explanation"]["words"]:
        assert texts[word["field"]][word["start"] : word["end"]] == word["word"]
    return dict(result)


def score_alone(backbone: Backbone, adapter: Adapter, *texts: str) -> np.ndarray[Any, Any]:
    prepared = [prepare(adapter, backbone)]
    encoding = backbone.encoder.encode(*texts, max_length=adapter.spec.max_length)
    return classify(backbone, backbone.pack(rows_of(prepared, [(0, encoding)])), prepared)[0].scores


@pytest.mark.parametrize("kind", [True, "attention"])
def test_attention_gives_every_word_its_share_and_all_of_it_sums_to_one(
    live: RunningService, kind: bool | str
) -> None:
    result = explained(live, "  FREE win,  don't\n東 now ", kind)
    explanation = result["explanation"]
    assert (explanation["kind"], explanation["label"]) == ("attention", result["label"])
    words = explanation["words"]
    assert [word["word"] for word in words] == ["FREE", "win", ",", "don't", "東", "now"]
    assert [word["unknown"] for word in words] == [False, False, False, False, True, False]
    assert [word["field"] for word in words] == ["text"] * 6
    assert explanation["special_tokens"]["count"] == 2
    shares = [word["weight"] for word in words] + [explanation["special_tokens"]["weight"]]
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert explanation["read"] == {"text": 25, "text_pair": None}
    assert "note" not in explanation


def test_offsets_count_code_points_of_the_text_as_it_was_sent(live: RunningService) -> None:
    text = "\U0001f642 e\u0301 ﬁne 👩\u200d👧 free"
    words = explained(live, text)["explanation"]["words"]
    assert [(word["word"], word["start"], word["end"]) for word in words] == [
        ("\U0001f642", 0, 1),
        ("e\u0301", 2, 4),
        ("ﬁne", 5, 8),
        ("👩\u200d👧", 9, 12),
        ("free", 13, 17),
    ]


def test_a_pair_tells_its_texts_apart_and_what_was_read_of_each(live: RunningService) -> None:
    pair = {"text": "free win now", "text_pair": "the card"}
    words = explained(live, pair)["explanation"]["words"]
    assert [(word["field"], word["start"]) for word in words] == [
        *(("text", start) for start in (0, 5, 9)),
        *(("text_pair", start) for start in (0, 4)),
    ]
    long = {"text": "free win now call you", "text_pair": "the card"}
    result = explained(live, long, adapter="short")
    assert result["truncated"]
    assert result["explanation"]["read"] == {"text": len("free win now"), "text_pair": 8}
    assert [word["word"] for word in result["explanation"]["words"]][2:] == ["now", "the", "card"]


def test_a_long_text_is_explained_as_far_as_it_is_read(live: RunningService) -> None:
    text = "free" + " " * 5000 + "win " * 100_000
    result = explained(live, text, adapter="short")
    words = result["explanation"]["words"]
    assert [word["word"] for word in words] == ["free", *["win"] * 5]
    assert result["explanation"]["read"]["text"] == words[-1]["end"] == 5004 + 5 * 4 - 1


def test_the_answer_is_the_same_with_and_without(live: RunningService) -> None:
    inputs = ["free win now", "my card is not good", "", {"text": "call", "text_pair": "you"}]
    for adapter in ("a", "tags", "short"):
        plain = live.predict(adapter=adapter, inputs=inputs)["results"]
        for kind in ("attention", "occlusion"):
            results = live.predict(adapter=adapter, inputs=inputs, explain=kind)["results"]
            for before, after in zip(plain, results, strict=True):
                explanation = after.pop("explanation")
                assert explanation["kind"] == kind
                for scores in (before, after):
                    scores["numbers"] = [scores["score"], *(s["score"] for s in scores["scores"])]
                assert after["numbers"] == pytest.approx(before["numbers"], abs=1e-6)
                same = set(before) - {"numbers", "score", "scores"}
                assert {name: after[name] for name in same} == {name: before[name] for name in same}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone()


def test_occlusion_is_what_the_score_of_the_label_loses_without_each_word(
    live: RunningService, backbone: Backbone
) -> None:
    adapter = plain(backbone)
    pair = {"text": "free win now", "text_pair": "the card"}
    result = explained(live, pair, "occlusion")
    explanation = result["explanation"]
    assert explanation["label"] == result["label"]
    assert explanation["special_tokens"] == {"count": 3, "weight": None}
    best = LABELS.index(result["label"])
    texts = [pair["text"].split(), pair["text_pair"].split()]
    assert len(explanation["words"]) == 5
    for word in explanation["words"]:
        left = [[each for each in part if each != word["word"]] for part in texts]
        score = score_alone(backbone, adapter, *map(" ".join, left))[best]
        assert word["weight"] == pytest.approx(result["score"] - score, abs=2e-6)


def test_occlusion_hides_the_first_words_of_a_long_text_and_says_so(live: RunningService) -> None:
    text = "free win now call you " * 40
    whole = explained(live, text)["explanation"]["words"]
    assert len(whole) > 40
    explanation = explained(live, text, "occlusion")["explanation"]
    places = [(word["start"], word["end"]) for word in explanation["words"]]
    assert places == [(word["start"], word["end"]) for word in whole[:40]]
    assert explanation["note"] == (f"the first 40 of {len(whole)} words were hidden, one at a time")


def test_both_texts_of_a_pair_have_their_share_of_hidden_words() -> None:
    def places(first: int, second: int) -> list[Place]:
        word = Word(0, 1, (0,), False)
        return [Place("text", word)] * first + [Place("text_pair", word)] * second

    def kept(first: int, second: int, most: int) -> tuple[int, int]:
        chosen = first_words(places(first, second), most)
        fields = [field for field, _ in chosen]
        return fields.count("text"), fields.count("text_pair")

    assert kept(3, 2, 8) == (3, 2)
    assert kept(100, 100, 8) == (4, 4)
    assert kept(100, 1, 8) == (7, 1)
    assert kept(2, 100, 8) == (2, 6)
    assert kept(100, 0, 8) == (8, 0)


def test_more_words_than_may_be_hidden_are_refused_and_the_setting_is_named(
    live: RunningService,
) -> None:
    body: dict[str, Any]
    body = {"adapter": "a", "inputs": ["free win now call you"] * 9, "explain": "occlusion"}
    response = live.client.post("/v1/predict", json=body)
    assert response.status_code == 413
    message = error_of(response)["message"]
    assert message.startswith("45 words would be hidden, at most 40 may be")
    assert "IDSPAM_MAX_HIDDEN_WORDS" in message
    fewer = live.predict(**body | {"inputs": body["inputs"][:8]})["results"]
    assert [len(result["explanation"]["words"]) for result in fewer] == [5] * 8


def test_a_service_may_hide_no_words_at_all(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serve(tmp_path_factory.mktemp("none"), MAX_HIDDEN_WORDS="0") as running:
        running.put("a", plain(make_backbone()))
        body = {"adapter": "a", "inputs": "free", "explain": "occlusion"}
        response = running.client.post("/v1/predict", json=body)
        assert response.status_code == 422
        assert "IDSPAM_MAX_HIDDEN_WORDS" in error_of(response)["details"][0]
        assert running.predict(**body | {"explain": "attention"})["results"]


@pytest.mark.parametrize("kind", ["yes", 1, None, "", ["attention"], {"kind": "attention"}])
def test_another_kind_of_explanation_is_a_fault(live: RunningService, kind: Any) -> None:
    body = {"adapter": "a", "inputs": "free", "explain": kind}
    response = live.client.post("/v1/predict", json=body)
    assert response.status_code == 422
    assert error_of(response)["details"] == [
        'explain: Input should be true, false, "attention" or "occlusion"'
    ]
    assert live.predict(**body | {"explain": False})["results"][0].keys() >= {"label"}


def test_words_are_hidden_from_the_revision_that_answers(live: RunningService) -> None:
    live.put("tried", plain(make_backbone()))
    other = serialize(make_adapter(make_backbone(), seed=9, labels=LABELS))
    staged = live.client.put("/v1/adapters/tried?stage=true", content=other).json()["revision"]
    body = {"revision": staged, "percent": 100.0, "rule": {"max_error_rate": None}}
    assert live.client.put("/v1/adapters/tried/traffic", json=body).status_code == 200
    divided = explained(live, "free win now", "occlusion", adapter="tried")
    pinned = explained(live, "free win now", "occlusion", adapter=f"tried@{staged}")
    assert divided["revision"] == staged
    weights = [
        [word["weight"] for word in each["explanation"]["words"]] for each in (divided, pinned)
    ]
    assert weights[0] == pytest.approx(weights[1], abs=1e-6)
    # Only the text itself counts as one that the second revision has read.
    figures = live.client.get("/v1/adapters/tried/traffic").json()["figures"]
    assert figures["canary"]["texts"] == 1
    assert live.client.delete("/v1/adapters/tried").status_code == 204


def test_hidden_words_are_not_counted_as_answers(live: RunningService) -> None:
    def answers() -> float:
        names = ("idspam_predictions_total", "tags")
        return sum(live.metric(names[0], adapter=names[1], label=label) for label in LABELS)

    live.predict(adapter="tags", inputs="free win now")
    before = answers()
    live.predict(adapter="tags", inputs="free win now", explain="occlusion")
    assert answers() == before + 1
