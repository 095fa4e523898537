"""The texts of a request that the engine wants to be kept: it has no texts, only their tokens."""

from collections.abc import Sequence

from service.drift.interface import MOST_CHARACTERS, MOST_SCORES, UncertainText
from service.drift.uncertain import certainty_of
from service.engine.interface import Completion
from service.http.texts import Text
from service.records.line_file import now


def uncertain_texts(texts: Sequence[Text], completion: Completion) -> list[UncertainText]:
    """Those texts of a request that the engine wants to be kept."""
    return [_uncertain(texts[index], completion, index) for index in completion.uncertain]


def _uncertain(item: Text, completion: Completion, index: int) -> UncertainText:
    scores = completion.rows[index].scores
    best = scores.argsort()[::-1][:MOST_SCORES].tolist()
    labels = item.spec.labels
    text, pair = _shortened(item.text), _shortened(item.text_pair)
    assert text is not None
    return UncertainText(
        adapter=item.key.name,
        revision=item.key.revision,
        text=text,
        text_pair=pair,
        label=labels[int(scores.argmax())],
        certainty=round(certainty_of(item.spec, scores), 6),
        scores=tuple((labels[at], round(float(scores[at]), 6)) for at in best),
        time=now(),
        cut=max(len(item.text), len(item.text_pair or "")) > MOST_CHARACTERS,
    )


def _shortened(text: str | None) -> str | None:
    """What is kept of a text. A lone surrogate could not be sent on."""
    if text is None:
        return None
    return text[:MOST_CHARACTERS].encode("utf-8", "replace").decode()
