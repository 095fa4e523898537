"""What crosses between client and service, typed and frozen. Knows no HTTP.

Answers may gain fields: those that are not known here are left out.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

import msgspec


class Input(msgspec.Struct, frozen=True, omit_defaults=True):
    """One text or pair of texts. adapter: instead of the request's; `name` or `name@revision`.

    id: returned with the answer.
    """

    text: str
    text_pair: str | None = None
    adapter: str | None = None
    id: str | None = None


Text: TypeAlias = str | Input


class Options(TypedDict, total=False):
    """What may be said of a prediction; what is not said is the service's default.

    top_k: how many labels `scores` holds. truncate: False refuses a text that is longer than its
    adapter reads. explain: what share of its prompt came from each token. timeout_ms: answer by
    then or fail. request_id: for both logs, 1 to 128 of `A-Za-z0-9._:-`.
    """

    top_k: int
    truncate: bool
    explain: bool
    timeout_ms: int
    request_id: str


class Score(msgspec.Struct, frozen=True):
    label: str
    score: float


class TokenWeight(msgspec.Struct, frozen=True):
    """What share of the prompt came from this token; those of a text sum to one."""

    token: str
    weight: float


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer for one input. scores: best first. tokens: that were read.

    truncated: the text was cut to what its adapter reads. explanation: only with `explain`.
    """

    id: str | None
    adapter: str
    revision: str
    label: str
    score: float
    scores: tuple[Score, ...]
    tokens: int
    truncated: bool
    explanation: tuple[TokenWeight, ...] | None = None


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds; queue and inference are those of the slowest input."""

    tokenize: float
    queue: float
    inference: float


class Answer(msgspec.Struct, frozen=True):
    """One request's results, in the order of its inputs: `answer[0].label`, `for ... in answer`."""

    results: tuple[Result, ...]
    timings_ms: Timings

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Result:
        return self.results[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)


class AdapterSummary(msgspec.Struct, frozen=True):
    """One adapter as the list has it. reason: why it is not ready. size: bytes of its file."""

    name: str
    revision: str | None
    state: Literal["ready", "incompatible", "damaged"]
    reason: str | None
    labels: tuple[str, ...]
    method: str | None
    backbone: str | None
    prompt_length: int | None
    created: str | None
    size: int | None


class AdapterDetail(AdapterSummary, frozen=True):
    """Everything known about an adapter. revisions: the most recently published first."""

    revisions: tuple[str, ...]
    spec: dict[str, Any] | None


class AdapterPage(msgspec.Struct, frozen=True):
    """One page of the list; next_cursor: None on the last."""

    adapters: tuple[AdapterSummary, ...]
    next_cursor: str | None


class Published(msgspec.Struct, frozen=True):
    """What an upload or a rollback left behind.

    created: the name is new. changed: False: these bytes were served already.
    """

    name: str
    revision: str
    created: bool
    changed: bool

    @property
    def outcome(self) -> str:
        """`created`, `replaced` or `unchanged`."""
        return "created" if self.created else "replaced" if self.changed else "unchanged"


class AdapterFile(msgspec.Struct, frozen=True):
    """A downloaded file; revision: its sha256, which was checked."""

    revision: str
    data: bytes


class Health(msgspec.Struct, frozen=True):
    """What a probe is told. reason: one sentence whenever the service is not ready."""

    status: Literal["ok", "unavailable"]
    reason: str | None
    details: dict[str, float | str]

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class PredictBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a predict request."""

    inputs: Text | Sequence[Text]
    adapter: str | None = None
    top_k: int | None = None
    truncate: bool | None = None
    explain: bool | None = None
    timeout_ms: int | None = None


class RollbackBody(msgspec.Struct, frozen=True):
    revision: str | None


class ErrorContent(msgspec.Struct, frozen=True):
    type: str
    message: str
    details: tuple[str, ...] = ()


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorContent
