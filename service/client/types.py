"""The types of requests and answers, all frozen.

Answers of a later service may have more fields; they are ignored.
"""

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, TypedDict

import msgspec


class Input(msgspec.Struct, frozen=True, omit_defaults=True):
    """One text or pair of texts. id: returned with the answer.

    adapter: replaces the request's; `name` or `name@revision`. adapters: several, each of which
    answers; not in a stream.
    """

    text: str
    text_pair: str | None = None
    adapter: str | None = None
    id: str | None = None
    adapters: tuple[str, ...] | None = None


Text: TypeAlias = str | Input
# attention: what the prompt was made of. occlusion: what the score falls by without a word.
Explain: TypeAlias = Literal["attention", "occlusion"]
# For which replicas that share a store a change waits.
Wait: TypeAlias = Literal["all", "one", "none"]


class Options(TypedDict, total=False):
    """Options of a prediction; the service has a default for each.

    top_k: how many labels `scores` holds. truncate: False refuses a text that is longer than its
    adapter reads. explain: return an `Explanation`, `True` one by attention. abstain_below: a best
    score below it is no answer, in place of what the adapter's file says. timeout_ms: answer within
    this time or fail. request_id: 1 to 128 of `A-Za-z0-9._:-`, for the logs of both sides.
    request_key: 1 to 256 visible ASCII characters; while the texts of an adapter are divided
    between two revisions, equal keys get the same one. Without it each input is its own key.
    """

    top_k: int
    truncate: bool
    explain: bool | Explain
    abstain_below: float
    timeout_ms: int
    request_id: str
    request_key: str


class Score(msgspec.Struct, frozen=True):
    label: str
    score: float


class Word(msgspec.Struct, frozen=True):
    """A word of a text, as it was sent: `text[start:end] == word`.

    weight: by attention, its share of the prompt; by occlusion, how much the score falls without
    it. unknown: the tokenizer's vocabulary lacks some of it.
    """

    field: Literal["text", "text_pair"]
    start: int
    end: int
    word: str
    weight: float
    unknown: bool


class SpecialTokens(msgspec.Struct, frozen=True):
    """The tokens that belong to no word. weight: their share of the prompt; None by occlusion."""

    count: int
    weight: float | None


class Read(msgspec.Struct, frozen=True):
    """How many characters of each text were read: less than its length if it was cut."""

    text: int
    text_pair: int | None


class Explanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which words an answer comes from. label: the best one, of whose score this is said.

    By attention, all weights, with that of the special tokens, add up to one. note: what is missing
    here, in one sentence.
    """

    kind: Explain
    label: str
    words: tuple[Word, ...]
    special_tokens: SpecialTokens
    read: Read
    note: str | None = None


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer for one input. scores: best first. tokens: how many were read.

    label: the label of the highest score. labels: if the adapter gives several labels a text, all
    whose scores reach their thresholds, perhaps none; None if it gives one. abstained: the score is
    too low, so that `label` is no answer; None where nothing says when to abstain. truncated: the
    text was longer than its adapter reads. explanation: only with `explain`. input: the number of
    the input, from 0, where an input of the request names several adapters.
    """

    id: str | None
    adapter: str
    revision: str
    label: str
    score: float
    scores: tuple[Score, ...]
    tokens: int
    truncated: bool
    explanation: Explanation | None = None
    labels: tuple[str, ...] | None = None
    abstained: bool | None = None
    input: int | None = None


class Ranked(msgspec.Struct, frozen=True):
    """A document and how well it fits. index: its place among those that were sent."""

    index: int
    score: float


class Ranking(msgspec.Struct, frozen=True):
    """Documents, the best first: `for ranked in ranking`. tokens: how many were read."""

    results: tuple[Ranked, ...]
    tokens: int

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Ranked:
        return self.results[index]

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.results)


class Embeddings(msgspec.Struct, frozen=True):
    """The vectors of texts, in their order. model: the backbone. tokens: how many were read."""

    vectors: tuple[tuple[float, ...], ...]
    model: str
    tokens: int

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return self.vectors[index]

    def __iter__(self) -> Iterator[tuple[float, ...]]:
        return iter(self.vectors)


class ErrorContent(msgspec.Struct, frozen=True):
    """type: for programs; docs/api.md has all of them."""

    type: str
    message: str
    details: tuple[str, ...] = ()


class Unanswered(msgspec.Struct, frozen=True):
    """In place of the result of an input that cannot be answered. id: the input's."""

    id: str | None
    error: ErrorContent


class Timings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Milliseconds; queue and inference are those of the slowest input.

    shared: how many answers took their lower layers from another one for the same text; None where
    no input names several adapters.
    """

    tokenize: float
    queue: float
    inference: float
    shared: int | None = None


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


# The service's OpenAPI page is made from this definition as well.
AdapterState: TypeAlias = Literal["ready", "incompatible", "damaged", "unloaded"]


class AdapterSummary(msgspec.Struct, frozen=True):
    """One adapter of the list. reason: why it is not ready. size: of its file, in bytes."""

    name: str
    revision: str | None
    state: AdapterState
    reason: str | None
    labels: tuple[str, ...]
    method: str | None
    backbone: str | None
    prompt_length: int | None
    created: str | None
    size: int | None


class Version(msgspec.Struct, frozen=True):
    """A stored revision. stored: when its file was written. size: in bytes. reason: why it cannot
    be served. who: the name of the key that uploaded it, if that is known."""

    revision: str
    stored: str
    size: int
    method: str | None
    reason: str | None
    who: str | None


class Event(msgspec.Struct, frozen=True):
    """Something that was done to a revision. who: the name of the key, if that is known."""

    at: str
    what: str
    revision: str
    who: str | None


class AdapterDetail(AdapterSummary, frozen=True, kw_only=True):
    """Everything known about an adapter.

    revisions: the most recently published first. versions: the same in full, the current one first.
    events: what was done to them, the newest first.
    """

    revisions: tuple[str, ...]
    spec: dict[str, Any] | None
    # A service before 0.6.0 has neither.
    versions: tuple[Version, ...] = ()
    events: tuple[Event, ...] = ()


class AdapterPage(msgspec.Struct, frozen=True):
    """One page of the list. next_cursor: None on the last page. total: on all pages."""

    adapters: tuple[AdapterSummary, ...]
    next_cursor: str | None
    total: int | None = None


class Card(msgspec.Struct, frozen=True):
    """The model card of a revision. text: Markdown that somebody uploaded; its HTML may be
    anything."""

    revision: str
    text: str


class UploadRefusal(msgspec.Struct, frozen=True):
    """The error that an upload would be answered with."""

    status: int
    type: str
    message: str
    details: tuple[str, ...] = ()


class LabelChanges(msgspec.Struct, frozen=True):
    """reordered: the labels that both have are in another order."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    reordered: bool


class ValueChange(msgspec.Struct, frozen=True):
    """field: its place in the spec, a label, or a figure. None: that side has no such value."""

    field: str
    before: Any
    after: Any


class SpecDifference(msgspec.Struct, frozen=True):
    """What a file changes against the current revision. tables: larger parts that differ."""

    labels: LabelChanges
    thresholds: tuple[ValueChange, ...]
    fields: tuple[ValueChange, ...]
    figures: tuple[ValueChange, ...]
    tables: tuple[str, ...]

    def lines(self) -> list[str]:
        """One for each difference, for people."""
        lines = []
        if self.labels.added:
            lines.append(f"labels added: {', '.join(self.labels.added)}")
        if self.labels.removed:
            lines.append(f"labels removed: {', '.join(self.labels.removed)}")
        if self.labels.reordered:
            lines.append("labels in another order")
        for kind, changes in (
            ("", self.fields),
            ("threshold of ", self.thresholds),
            ("", self.figures),
        ):
            lines += [f"{kind}{each.field}: {each.before} -> {each.after}" for each in changes]
        return lines + [f"{name} differs" for name in self.tables]


class RevisionDifference(msgspec.Struct, frozen=True):
    """What differs between two stored revisions. before, after: in full."""

    name: str
    before: str
    after: str
    difference: SpecDifference


class UploadedFile(msgspec.Struct, frozen=True):
    """What a file declares, as far as it can be read. size: in bytes."""

    revision: str
    size: int
    labels: tuple[str, ...]
    method: str | None
    backbone: str | None
    prompt_length: int | None
    created: str | None
    spec: dict[str, Any] | None


class UploadReport(msgspec.Struct, frozen=True):
    """What an upload would come to; nothing was stored.

    serving: the current revision, None if the name is new. difference: None if the name is new, or
    one of the two files cannot be read. unchecked: what only the upload itself tells, for people.
    """

    name: str
    accepted: bool
    error: UploadRefusal | None
    serving: str | None
    adapter: UploadedFile
    difference: SpecDifference | None
    unchecked: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        file, labels = self.adapter, len(self.adapter.labels)
        lines = [f"{self.name}: revision {file.revision}, {file.size:,} bytes, {labels} labels"]
        if self.serving is None:
            lines.append("the name is new")
        elif self.serving == file.revision:
            lines.append("this is what is served")
        else:
            lines.append(f"takes the place of {self.serving}")
            lines += self.difference.lines() if self.difference is not None else []
        if self.accepted:
            lines += [f"not checked: {each}" for each in self.unchecked]
            lines.append("would be accepted")
        return lines


class Published(msgspec.Struct, frozen=True):
    """The result of an upload or a rollback.

    created: the name is new. changed: False if this revision was served already, or was only
    staged.
    """

    name: str
    revision: str
    created: bool
    changed: bool

    @property
    def outcome(self) -> str:
        """`created`, `replaced` or `unchanged`: of what is served."""
        return "created" if self.created else "replaced" if self.changed else "unchanged"


class Rule(msgspec.Struct, frozen=True):
    """When a second revision is taken back by itself. None: no such limit.

    max_error_rate: share of its texts that may fail. max_disagreement: share of the compared texts
    that may get another answer. max_latency_ratio: its latency by the current revision's, for a
    canary. min_texts: nothing is decided on fewer. window_seconds: what was seen earlier does not
    count.
    """

    max_error_rate: float | None = 0.02
    max_disagreement: float | None = 0.2
    max_latency_ratio: float | None = 2.0
    min_texts: int = 30
    window_seconds: float = 600.0


class Reading(msgspec.Struct, frozen=True):
    """What one role has read. latency_ms: geometric mean of its requests, of a shadow's batches."""

    texts: int
    errors: int
    latency_ms: float | None


class Direction(msgspec.Struct, frozen=True):
    """So many texts get the answer `after` where the current revision says `before`."""

    before: str
    after: str
    texts: int


class Figures(msgspec.Struct, frozen=True):
    """What was seen within the rule's window.

    current, canary: texts that the current revision and the second one answered. shadow: texts that
    the revision which did not answer them has read too. dropped: those that it has not.
    disagreement_low, disagreement_high: the interval of the rate. score_difference: the second
    revision's score minus the current one's, for the current one's best label; a mean.
    """

    current: Reading
    canary: Reading
    shadow: Reading
    dropped: int
    compared: int
    disagreements: int
    disagreement_rate: float | None
    disagreement_low: float | None
    disagreement_high: float | None
    score_difference: float | None
    directions: tuple[Direction, ...]


class Ending(msgspec.Struct, frozen=True):
    """Why the current revision reads all texts again. cause: for programs. reason: a sentence."""

    cause: str
    reason: str
    at: str


class TrafficDetail(msgspec.Struct, frozen=True):
    """How an adapter's texts are divided between two revisions, or were last.

    revision: the second one. baseline: the current one when this began. percent: of the texts that
    the second one reads; it answers them unless `shadow`.
    """

    name: str
    current: str | None
    state: Literal["active", "ended"]
    revision: str | None
    baseline: str | None
    percent: float
    shadow: bool
    rule: Rule
    since: str | None
    ended: Ending | None
    figures: Figures | None


class DriftBin(msgspec.Struct, frozen=True):
    """reference: the share of the texts of training. seen: of those that were answered."""

    bin: str
    reference: float
    seen: float


class DriftQuantity(msgspec.Struct, frozen=True):
    """How far one quantity has moved. psi: the population stability index. chance: what it stays
    under without any drift."""

    quantity: str
    psi: float
    chance: float
    level: Literal["stable", "moderate", "large"]
    bins: tuple[DriftBin, ...]


class Drift(msgspec.Struct, frozen=True):
    """The last texts of one revision, beside the profile of its training.

    texts: that were counted since then. reference_texts: of the profile. note: why there are no
    quantities. counting_since: when the engine began to count; a new one begins at zero.
    """

    adapter: str
    revision: str
    texts: int
    since: str | None
    reference_texts: int
    quantities: tuple[DriftQuantity, ...]
    note: str | None = None
    counting_since: str | None = None


class UncertainText(msgspec.Struct, frozen=True):
    """A text to be labelled. answer: the best label, which may be wrong. cut: only the beginning of
    the text is kept."""

    text: str
    text_pair: str | None
    answer: str
    certainty: float
    scores: tuple[Score, ...]
    time: str
    revision: str
    cut: bool


class UncertainTexts(msgspec.Struct, frozen=True):
    adapter: str
    texts: tuple[UncertainText, ...]


class AdapterFile(msgspec.Struct, frozen=True):
    """A downloaded file. revision: its sha256, which was checked."""

    revision: str
    data: bytes


class Health(msgspec.Struct, frozen=True):
    """The answer of a probe. reason: one sentence, if the service is not ready."""

    status: Literal["ok", "unavailable"]
    reason: str | None
    details: dict[str, float | str]

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class ErrorBody(msgspec.Struct, frozen=True):
    """The routes under other names than `/v1` answer with a sentence alone."""

    error: ErrorContent | str
