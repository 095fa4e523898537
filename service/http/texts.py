"""The inputs of a request, each with the revision that answers it, whatever protocol they came in.

A name whose texts are divided between two revisions is decided here, by the request key: the
`X-Request-Key` header, or else the input itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

from starlette.requests import Request

from adapters.format.spec import AdapterSpec
from adapters.tokenizer import Encoding
from service.catalog.entry import Resolved
from service.catalog.traffic import key_of_text
from service.engine.interface import AdapterKey, cost_of
from service.engine.observer import Observer
from service.engine.trials import Trial

REQUEST_KEY = "x-request-key"


class Tried(NamedTuple):
    """candidate: the second revision of the text's name. other, other_spec: the revision that reads
    the text too, to be compared with the answer; None: none does."""

    candidate: str
    other: str | None = None
    other_spec: AdapterSpec | None = None


# Not frozen: one is made for every text, and a frozen one takes four times as long.
@dataclass(slots=True, eq=False)
class Text:
    """One input and its adapter. place: where it is in the client's request, for faults. tried: set
    while the texts of its name are divided; `key` and `spec` are of the revision that answers."""

    text: str
    text_pair: str | None
    key: AdapterKey
    spec: AdapterSpec
    place: str
    tried: Tried | None = None


class TextMaker:
    """Makes the texts of one request.

    Args:
        key: of all texts, if the request has none; None: each text is its own.
    """

    def __init__(self, request: Request, key: bytes | None = None) -> None:
        self._request = request
        self._key = key

    def __call__(self, adapter: Resolved, text: str, text_pair: str | None, place: str) -> Text:
        split = adapter.split
        if split is None:
            return Text(text, text_pair, adapter.key, adapter.spec, place)
        traffic = split.traffic
        # Not the connection's business to check: any value is as good a key as any other.
        given = self._request.headers.get(REQUEST_KEY, "").encode("utf-8", "surrogatepass")
        own = self._key or key_of_text(text, text_pair)
        taken = traffic.takes(adapter.key.name, given or own)
        candidate = traffic.revision
        if not taken:
            return Text(text, text_pair, adapter.key, adapter.spec, place, Tried(candidate))
        if traffic.shadow:
            tried = Tried(candidate, candidate, split.spec)
            return Text(text, text_pair, adapter.key, adapter.spec, place, tried)
        tried = Tried(candidate, adapter.key.revision, adapter.spec)
        return Text(text, text_pair, split.key, split.spec, place, tried)


def trial_of(text: Text, encoding: Encoding, observer: Observer) -> Trial:
    """What the engine needs to know of a text of a divided name.

    A text is compared only if both revisions read all of it, or the same part of it.
    """
    tried = text.tried
    assert tried is not None
    if tried.other is None or tried.other_spec is None:
        return Trial(tried.candidate)
    same = text.spec.max_length == tried.other_spec.max_length
    if not same and (encoding.truncated or len(encoding) > tried.other_spec.max_length):
        observer.trial_dropped(text.key.name, "length", 1)
        return Trial(tried.candidate)
    return Trial(tried.candidate, tried.other, cost_of(encoding, tried.other_spec))
