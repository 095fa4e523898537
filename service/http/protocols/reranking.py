"""Texts in the order of how well they fit a query: pairs through one adapter, sorted by one label.

Every text is read as a pair with the query, in the same batches as everything else. While the texts
of an adapter are divided between two revisions, one query is answered by one revision: scores of
different revisions have no common order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from starlette.requests import Request

from adapters.format.spec import AdapterSpec
from adapters.tokenizer import End
from service.catalog.entry import Resolved
from service.catalog.traffic import key_of_text
from service.errors import InvalidRequest, NoInputs, TooLarge
from service.http.answer_size import AnswerShape
from service.http.classify import Answers, classify, ranked
from service.http.lifecycle import service_of
from service.http.texts import TextMaker

# `{"index":1024,"document":{"text":,"multi_modal":null},"relevance_score":0.12345678901234567},`
SCORE_BYTES = 96
_SHOWN_LABELS = 8
# `not_equivalent` says no where `equivalent` says yes.
_NO = ("not_", "not-", "not ", "non_", "non-", "no_", "in", "ir", "un")


@dataclass(frozen=True, slots=True)
class Ranking:
    """label: the one that the texts are sorted by. scores: of that label, in the texts' order.
    order: indices of the texts, the best first; of equal ones the earlier."""

    answers: Answers
    label: str
    scores: Sequence[float]
    order: Sequence[int]


async def rerank(
    request: Request,
    adapter: Resolved,
    query: str,
    texts: Sequence[str],
    *,
    label: str | None,
    deadline: float,
    cut: End | Literal["nothing"] = "tail",
    place: str,
) -> Ranking:
    """Score every text with the query.

    Args:
        label: None: the one that says yes, if the adapter's labels tell.
        deadline, cut: as of `classify`.
        place: what the protocol calls the list of texts, for faults.

    Raises:
        NoInputs, TooLarge: no texts, or more than there may be.
        InvalidRequest: the adapter has no such label, or its labels do not tell which one is meant.
        ServiceError: as `classify`.
    """
    limit = service_of(request).settings.max_inputs
    if not texts:
        raise NoInputs
    if len(texts) > limit:
        raise TooLarge(f"{len(texts)} {place}, at most {limit} are allowed")
    at = index_of_label(adapter.spec, label)
    text_of = TextMaker(request, key=key_of_text(query, None))
    answers = await classify(
        request,
        [text_of(adapter, query, text, f"{place}.{index}") for index, text in enumerate(texts)],
        deadline=deadline,
        cut=cut,
        shape=AnswerShape(SCORE_BYTES, labels=False, top_k=1),
    )
    # The revisions that may answer have the same labels.
    scores = [float(row.scores[at]) for row in answers.rows]
    return Ranking(
        answers, adapter.spec.labels[at], scores, [index for index, _ in ranked(np.array(scores))]
    )


def index_of_label(spec: AdapterSpec, label: str | None) -> int:
    """The label whose score is the order of the texts.

    Raises:
        InvalidRequest: there is none of this name, or none is named and the labels do not tell.
    """
    labels = spec.labels
    if label is not None:
        if label not in labels:
            raise InvalidRequest([f"label: the adapter has no such label, but {_listed(labels)}"])
        return labels.index(label)
    if len(labels) == 1:
        return 0
    if len(labels) == 2:
        for index, name in enumerate(labels):
            if labels[1 - index] in {no + name for no in _NO}:
                return index
    raise InvalidRequest(
        [f"label: missing: by which label are texts sorted, of {_listed(labels)}?"]
    )


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
    return ", ".join(label[:64] for label in labels[:_SHOWN_LABELS]) + more
