"""The JSON of this project's own routes, as models.

Requests are validated with them. Answers are built as plain dicts of the same shape, which tests
check against the response models; the OpenAPI document shows both.
"""

from typing import Annotated, Any, Literal, TypeAlias, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    RootModel,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from adapters.format.events import Happening
from adapters.profiles import Quantity
from service.client.types import AdapterState, Explain
from service.drift.shift import Level
from service.engine.trials import Cause

MAX_ID_LENGTH = 256
# A name of at most 64 characters, "@", a revision of at most 64.
MAX_REFERENCE_LENGTH = 129
# For one input.
MAX_ADAPTERS = 64
# Of whole numbers that have no bound of their own.
MAX_INTEGER = 2**31 - 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Lenient(BaseModel):
    """Base of other protocols' requests: unknown fields are ignored, as in those servers."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


def _whole(value: Any) -> Any:
    # To JSON 2.0 is the same number as 2. Larger floats do not tell which integer they are.
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    return int(value) if is_whole else value


# The last of an integer's annotations, after its bounds: else these are missing in its JSON schema.
Whole = BeforeValidator(_whole)
Integer = Annotated[int, Whole]
Positive = Annotated[int, Field(ge=1, le=MAX_INTEGER), Whole]
Reference = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_REFERENCE_LENGTH,
        description="`name`, or `name@prefix` with the first characters of a revision to pin it.",
    ),
]


TopK = Annotated[Positive, Field(description="How many of the labels to return; all by default.")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Timeout = Annotated[int, Field(ge=1, le=3_600_000), Whole]


# true is attention.
Explained: TypeAlias = Explain | Literal[False]


def _explained(value: Any) -> Explained:
    # `is`: 1 is equal to True.
    if value is False:
        return False
    if value is True:
        return "attention"
    for kind in get_args(Explain):
        if value == kind:
            return cast(Explain, kind)
    raise PydanticCustomError("explain", 'Input should be true, false, "attention" or "occlusion"')


_EXPLAINED: list[Any] = [False, True, *get_args(Explain)]
RequestExplain = Annotated[
    Explained, PlainValidator(_explained), WithJsonSchema({"enum": _EXPLAINED})
]
LineExplain = Annotated[
    Explained | None,
    PlainValidator(lambda value: None if value is None else _explained(value)),
    WithJsonSchema({"enum": [None, *_EXPLAINED]}),
]
_EXPLAIN = (
    "`attention` (or true): each word's share of the prompt. `occlusion`: what the label's score "
    "falls by without each word, for which the text is read once more for every word."
)


_ONE = {"required": ["adapter"], "properties": {"adapter": {"type": "string"}}}
_SEVERAL = {"required": ["adapters"], "properties": {"adapters": {"type": "array"}}}


def _not_both(schema: dict[str, Any]) -> None:
    """Add to a JSON schema that it does not have `adapter` and `adapters`."""
    schema["not"] = {"allOf": [_ONE, _SEVERAL]}


Adapters = Annotated[list[Reference], Field(min_length=1, max_length=MAX_ADAPTERS)]


class OneText(_Strict):
    """One text or pair of texts.

    An empty text is valid: it is classified from its special tokens alone.
    """

    text: str
    text_pair: str | None = Field(default=None, description="The second text, for tasks on pairs.")
    id: str | None = Field(
        default=None, max_length=MAX_ID_LENGTH, description="Returned with the answer."
    )


class PredictInput(OneText):
    """One text or pair of texts.

    An empty text is valid: it is classified from its special tokens alone.
    """

    model_config = ConfigDict(json_schema_extra=_not_both)

    adapter: Reference | None = Field(
        default=None, description="Overrides the request's `adapter` or `adapters`."
    )
    adapters: Adapters | None = Field(
        default=None, description="Several adapters, each of which answers: in place of `adapter`."
    )


def _kind(value: Any) -> str | None:
    """The branch of a JSON value, so that faults are reported for that branch alone."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, (dict, PredictInput)):
        return "object"
    return None


def _kind_or_list(value: Any) -> str | None:
    return "list" if isinstance(value, (list, tuple)) else _kind(value)


OneInput = Annotated[
    Annotated[str, Tag("text")] | Annotated[PredictInput, Tag("object")],
    Discriminator(
        _kind,
        custom_error_type="input_type",
        custom_error_message="Input should be a string or an object with `text`",
    ),
]
Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[PredictInput, Tag("object")]
    | Annotated[list[OneInput], Field(min_length=1), Tag("list")],
    Discriminator(
        _kind_or_list,
        custom_error_type="inputs_type",
        custom_error_message="Input should be a string, an object with `text`, or a list of these",
    ),
]
# Parts of an error's location that name a branch of the unions above and no place in the JSON.
BRANCHES = frozenset({"text", "object", "list"})


def _one_of_them_names_an_adapter(schema: dict[str, Any]) -> None:
    """Add to a JSON schema that the request names an adapter, or else each of its inputs does."""
    item = {"type": "object", "anyOf": [_ONE, _SEVERAL]}
    inputs = {"anyOf": [item, {"type": "array", "items": item}]}
    schema["anyOf"] = [_ONE, _SEVERAL, {"properties": {"inputs": inputs}}]
    _not_both(schema)


class PredictRequest(_Strict):
    """Texts to classify, each by the adapter that it or the request names."""

    model_config = ConfigDict(json_schema_extra=_one_of_them_names_an_adapter)

    adapter: Reference | None = Field(default=None, description="For inputs that name none.")
    adapters: Adapters | None = Field(
        default=None,
        description="Several adapters for inputs that name none, in place of `adapter`: each of "
        "them answers. The results of an input follow each other.",
    )
    inputs: Inputs
    top_k: Positive | None = Field(
        default=None, description="How many of the labels to return; all by default."
    )
    truncate: bool = Field(
        default=True,
        description="false: refuse a text longer than its adapter's `max_length` (422).",
    )
    explain: RequestExplain = Field(default=False, description=_EXPLAIN)
    abstain_below: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        default=None,
        description="A best score below it is no answer, in place of what the adapters' files say; "
        "0: every score is one. Not for adapters that give several labels a text (422).",
    )
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000), Whole] | None = Field(
        default=None, description="Answer within this time or fail (504)."
    )


class StreamLine(OneText):
    """A line of a stream: a text with the options that a request has, instead of the URL's."""

    adapter: Reference | None = Field(default=None, description="Overrides the URL's `adapter`.")
    top_k: TopK | None = None
    truncate: bool | None = None
    explain: LineExplain = Field(default=None, description=_EXPLAIN)
    abstain_below: Share | None = None
    timeout_ms: Timeout | None = Field(
        default=None, description="Answer within this time from when the line was read, or fail."
    )


def _flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _number(value: Any) -> Any:
    """A whole number of a URL, where all values are text."""
    digits = isinstance(value, str) and value.isascii() and value.removeprefix("-").isdecimal()
    return int(value[:20]) if digits else value


def _decimal(value: Any) -> Any:
    try:
        return float(value)
    except ValueError:
        return value


class StreamQuery(_Strict):
    """The query of a stream: what holds for lines that do not say otherwise."""

    adapter: Reference | None = Field(default=None, description="For lines that name none.")
    top_k: Annotated[TopK, BeforeValidator(_number)] | None = None
    truncate: Annotated[bool, BeforeValidator(_flag)] = True
    explain: Annotated[RequestExplain, BeforeValidator(_flag)] = Field(
        default=False, description=_EXPLAIN
    )
    abstain_below: Annotated[Share, BeforeValidator(_decimal)] | None = None
    timeout_ms: Annotated[Timeout, BeforeValidator(_number)] | None = None


class RollbackRequest(_Strict):
    """The revision to serve again."""

    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")] | None = Field(
        default=None,
        description="The first characters of a stored revision; null is the previous one.",
    )


_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class TrafficRule(_Strict):
    """When the second revision is taken back by itself. null: no such limit.

    A limit counts as crossed once chance does not explain it.
    """

    max_error_rate: _Share | None = Field(
        default=0.02, description="Share of its texts that may fail."
    )
    max_disagreement: _Share | None = Field(
        default=0.2, description="Share of the compared texts that may get another answer."
    )
    max_latency_ratio: Annotated[float, Field(gt=0.0, le=1000.0)] | None = Field(
        default=2.0,
        description="Its latency divided by the current revision's. For a canary only.",
    )
    min_texts: Annotated[int, Field(ge=1, le=1_000_000), Whole] = Field(
        default=30, description="Nothing is decided on fewer texts."
    )
    window_seconds: Annotated[float, Field(ge=1.0, le=604_800.0)] = Field(
        default=600.0, description="What was seen earlier does not count."
    )


class TrafficRequest(_Strict):
    """The second revision, and which share of the texts it reads."""

    revision: str = Field(
        pattern=r"^[0-9a-f]{1,64}$", description="The first characters of a stored revision."
    )
    percent: float = Field(
        ge=0.0,
        le=100.0,
        description="Of all texts of the adapter, those that the second revision reads, chosen by "
        "a hash of their request key: a greater share keeps them.",
    )
    shadow: bool = Field(
        default=False,
        description="true: it answers none of them, its answers are only compared. Texts are left "
        "out under load, and delay nothing.",
    )
    rule: TrafficRule | None = Field(
        default=None, description="When this ends by itself; null: the rule's defaults."
    )


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(_Answer):
    label: str
    score: float = Field(ge=0.0, le=1.0)


class ExplainedWord(_Answer):
    """A word of a text as it was sent, put together from tokens."""

    field: Literal["text", "text_pair"]
    start: int = Field(
        ge=0, description="Its place in the text as it was sent, in Unicode code points."
    )
    end: int
    word: str
    weight: float = Field(
        description="attention: its share of the prompt. occlusion: the label's score minus the "
        "score without this word; it may be negative."
    )
    unknown: bool = Field(description="The vocabulary of the tokenizer lacks some of it.")


class SpecialTokens(_Answer):
    """The tokens that belong to no word of the text. weight: their share; null for occlusion."""

    count: int
    weight: float | None


class ReadCharacters(_Answer):
    """Code points of each text that were read: less than its length if it was cut."""

    text: int
    text_pair: int | None


class Explanation(_Answer):
    """Which words the answer comes from. Words do not overlap, and are in the order of the text."""

    kind: Explain
    label: str = Field(description="The label of the highest score, of which this is said.")
    words: list[ExplainedWord] = Field(
        description="attention: the weights, with that of the special tokens, sum to one; no words "
        "if no prompt is made from the text. occlusion: the words that were hidden."
    )
    special_tokens: SpecialTokens
    read: ReadCharacters
    note: str | None = Field(default=None, description="What is missing, and why.")


class Result(_Answer):
    """The answer for one input, in the order of the inputs."""

    id: str | None
    input: int | None = Field(
        default=None,
        description="The number of the input, from 0. Only if a request names several adapters for "
        "an input.",
    )
    adapter: str
    revision: str = Field(description="sha256 of the adapter file that made this answer.")
    label: str = Field(description="The label of the highest score.")
    score: float
    labels: list[str] | None = Field(
        default=None,
        description="Only of adapters for several labels a text: those whose scores reach their "
        "thresholds, best first. May be empty. `top_k` does not cut it.",
    )
    abstained: bool | None = Field(
        default=None,
        description="Whether the best score is below `abstain_below`, so that `label` is no answer "
        "but what the answer would have been. Only where the adapter's file or the request says "
        "when to abstain.",
    )
    scores: list[Score] = Field(
        description="Best first. Softmax scores sum to one, sigmoid scores are independent."
    )
    tokens: int = Field(description="Tokens that were read, special tokens included.")
    truncated: bool
    explanation: Explanation | None = Field(default=None, description="Only with `explain`.")


class Timings(_Answer):
    tokenize: float
    queue: float
    inference: float
    shared: int | None = Field(
        default=None,
        description="How many answers took their lower layers from another answer for the same "
        "text. Only if a request names several adapters for an input.",
    )


class StreamError(_Answer):
    """In place of a line's answer. line: its number from 1, blank lines included; null: the stream
    ends here, and the lines without an answer may be sent again."""

    id: str | None
    line: int | None
    error: "ErrorBody"


class PredictResponse(_Answer):
    results: list[Result]
    timings_ms: Timings


class AdapterSummary(_Answer):
    """One line of the list."""

    name: str
    revision: str | None = Field(
        description="The one served now: sha256 of its file. null only if the store is damaged."
    )
    state: AdapterState
    reason: str | None = Field(description="Why it is not ready.")
    labels: list[str]
    method: str | None
    backbone: str | None = Field(description="The backbone it was trained on.")
    prompt_length: int | None
    created: str | None = Field(description="When it was trained, as its file says.")
    size: int | None = Field(description="Bytes of its file.")


class AdapterList(_Answer):
    adapters: list[AdapterSummary]
    next_cursor: str | None = Field(
        description="Pass it as `cursor` for the next page; null on the last."
    )
    total: int = Field(description="How many there are on all pages.")


class Version(_Answer):
    """One stored revision."""

    revision: str
    stored: str = Field(description="When its file was written.")
    size: int = Field(description="In bytes.")
    method: str | None
    reason: str | None = Field(description="Why it cannot be served.")
    who: str | None = Field(
        description="Who uploaded it: the name of a key. null: none was needed, the service "
        "itself, or it is not known any more."
    )


class Event(_Answer):
    """What was done to a revision."""

    at: str
    what: Happening
    revision: str
    who: str | None = Field(description="As of a version.")


class AdapterDetail(AdapterSummary):
    """Everything known about an adapter."""

    revisions: list[str] = Field(
        description="Every stored revision, the most recently published first."
    )
    versions: list[Version] = Field(description="The same revisions, with what is known of each.")
    events: list[Event] = Field(
        description="What became of them, the newest first: the last 20 events, and how each "
        "stored revision came."
    )
    spec: dict[str, Any] | None = Field(
        description="What the file declares: docs/adapter-format.md."
    )


class PublishedAdapter(_Answer):
    """The result of an upload or a rollback."""

    name: str
    revision: str = Field(description="Served from now on.")
    created: bool = Field(description="The name is new.")
    changed: bool = Field(
        description="false: these bytes were already being served, or the upload was only staged."
    )


class UploadError(_Answer):
    """The error that the upload would be answered with."""

    status: int
    type: str
    message: str
    details: list[str]


class UploadedFile(_Answer):
    """What a file declares, as far as it can be read."""

    revision: str = Field(description="sha256 of the file.")
    size: int = Field(description="In bytes.")
    labels: list[str]
    method: str | None
    backbone: str | None
    prompt_length: int | None
    created: str | None
    spec: dict[str, Any] | None


class LabelChanges(_Answer):
    """reordered: the labels that both have are in another order."""

    added: list[str]
    removed: list[str]
    reordered: bool


class ValueChange(_Answer):
    """null: that side has no such value."""

    field: str
    before: Any
    after: Any


class SpecDifference(_Answer):
    """What the file changes against the current revision."""

    labels: LabelChanges
    thresholds: list[ValueChange] = Field(description="By label, of those that both have.")
    fields: list[ValueChange] = Field(
        description="`kind`, `size` in bytes, then the fields of the spec: docs/adapter-format.md."
    )
    figures: list[ValueChange] = Field(description="Of the training, as the files say.")
    tables: list[str] = Field(description="Larger parts of the spec that differ.")


class RevisionDifference(_Answer):
    """What differs between two revisions of an adapter."""

    name: str
    before: str
    after: str
    difference: SpecDifference


class UploadReport(_Answer):
    """What an upload would come to. Nothing was stored."""

    name: str
    accepted: bool
    error: UploadError | None
    serving: str | None = Field(description="The current revision; null: the name is new.")
    adapter: UploadedFile
    difference: SpecDifference | None = Field(
        description="null: the name is new, or one of the two files cannot be read."
    )
    unchecked: list[str] = Field(description="What only the upload itself tells, for people.")


class UploadAnswer(RootModel[PublishedAdapter | UploadReport]):
    """A `PublishedAdapter`, or with `dry_run` an `UploadReport`."""


class TrafficReading(_Answer):
    """What one role has read. latency_ms: geometric mean of its requests, of a shadow's batches."""

    texts: int
    errors: int
    latency_ms: float | None


class TrafficDirection(_Answer):
    """So many texts get the answer `after` where the current revision says `before`. For sets of
    labels: one that is missing, or that comes in addition, beside an empty string."""

    before: str
    after: str
    texts: int


class TrafficFigures(_Answer):
    """What was seen within the rule's window, by this engine."""

    current: TrafficReading = Field(description="Texts that the current revision answered.")
    canary: TrafficReading = Field(description="Texts that the second revision answered.")
    shadow: TrafficReading = Field(
        description="Texts that the revision which did not answer them has read too."
    )
    dropped: int = Field(description="Texts that it has not, because of load or memory.")
    compared: int = Field(description="Texts that both revisions have read.")
    disagreements: int
    disagreement_rate: float | None
    disagreement_low: float | None = Field(description="The lower end of its interval.")
    disagreement_high: float | None
    score_difference: float | None = Field(
        description="Mean of the second revision's score minus the current one's, for the current "
        "one's best label."
    )
    directions: list[TrafficDirection] = Field(
        description="The ten most frequent disagreements since this began."
    )


class TrafficEnding(_Answer):
    """Why the current revision reads all texts again."""

    cause: Cause
    reason: str
    at: str


class TrafficDetail(_Answer):
    """How an adapter's texts are divided between two revisions, or were last."""

    name: str
    current: str | None
    state: Literal["active", "ended"]
    revision: str | None = Field(
        description="The second revision. null only if the store is damaged, as `baseline`."
    )
    baseline: str | None = Field(
        description="The current revision when this began. Once another one is current, it ends."
    )
    percent: float
    shadow: bool
    rule: TrafficRule
    since: str | None
    ended: TrafficEnding | None
    figures: TrafficFigures | None = Field(
        description="null if this engine has seen nothing: it has started after the end."
    )


class DriftBin(_Answer):
    bin: str
    reference: Share = Field(description="Of the texts of the profile.")
    seen: Share = Field(description="Of the texts that were answered.")


class DriftQuantity(_Answer):
    """How far one quantity has moved."""

    quantity: Quantity
    psi: float = Field(ge=0.0, description="The population stability index.")
    chance: float = Field(
        ge=0.0,
        description="Without any drift the index is below this in all but one of a thousand looks.",
    )
    level: Level = Field(
        description="moderate: above 0.1 and above chance. large: above 0.25 and above chance."
    )
    bins: list[DriftBin] = Field(description="Rare ones are joined with others.")


class DriftDetail(_Answer):
    """The last texts of one revision, beside the profile of its training."""

    adapter: str
    revision: str
    texts: int = Field(description="Those that were counted since `since`.")
    since: str | None = Field(description="When the first of them was counted.")
    counting_since: str = Field(
        description="When the engine of this replica began to count. Counts are in memory, so a "
        "new engine begins at zero."
    )
    reference_texts: int = Field(description="Those of the profile; 0: the file has none.")
    quantities: list[DriftQuantity]
    note: str | None = Field(description="Why there are no quantities.")


class UncertainText(_Answer):
    """A text to be labelled."""

    text: str
    text_pair: str | None
    answer: str = Field(description="The best label; it may be wrong.")
    certainty: Share = Field(
        description="The score of that label; of an adapter for sets of labels, how far the "
        "nearest score is from its threshold."
    )
    scores: list[Score] = Field(description="Of the best labels, at most five.")
    time: str
    revision: str
    cut: bool = Field(description="Whether only the beginning of the text is kept.")


class UncertainTexts(_Answer):
    """The texts of which an adapter is least certain."""

    adapter: str
    texts: list[UncertainText]


class ErrorBody(_Answer):
    type: str
    message: str
    details: list[str]


class ErrorResponse(_Answer):
    """The shape of every error."""

    error: ErrorBody


class TeiError(_Answer):
    """The shape of every error of Text Embeddings Inference."""

    error: str
    error_type: Literal["Unhealthy", "Overloaded", "Backend", "Empty", "Validation"]


class VllmErrorBody(_Answer):
    message: str
    type: str
    param: None
    code: int


class VllmError(_Answer):
    """The shape of every error of vLLM."""

    error: VllmErrorBody


class OipError(_Answer):
    """The shape of every error of the Open Inference Protocol."""

    error: str


class Health(_Answer):
    """A probe's answer. reason: one sentence whenever the service is not ready."""

    status: Literal["ok", "unavailable"]
    reason: str | None
    details: dict[str, float | str]
