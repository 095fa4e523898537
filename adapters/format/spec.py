"""The adapter spec: the configuration that an adapter file declares."""

import json
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from adapters.errors import InvalidAdapter, is_control, listing
from adapters.format.profile import Profile

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def label_fault(label: str) -> str | None:
    """Why a label could not be shown safely, naming it with escapes; None if it could."""
    fault = _control_fault(label)
    return None if fault is None else f"the label {fault}"


def _control_fault(text: str) -> str | None:
    if text.isprintable():
        return None
    for character in text:
        if is_control(character):
            shown = text.encode("unicode_escape").decode()[:128]
            return f"'{shown}' has the control character U+{ord(character):04X}"
    return None


def _printable_label(label: str) -> str:
    if (fault := label_fault(label)) is not None:
        raise ValueError(fault)
    return label


def _printable(text: str) -> str:
    if (fault := _control_fault(text)) is not None:
        raise ValueError(fault)
    return text


Label = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable_label)]
# For people, who read it in lists, cards and logs.
Text = Annotated[str, AfterValidator(_printable)]


Share = Annotated[float, Field(ge=0.0, le=1.0)]
# Threshold, share of the texts that are answered, share of these answers that is right.
CoveragePoint: TypeAlias = tuple[Share, Share, Share]
# A score of 0 or 1 would give a label to every text or to none.
Threshold = Annotated[float, Field(gt=0.0, lt=1.0)]
DEFAULT_THRESHOLD = 0.5

# Beyond this rank, fine-tuning is the better choice.
MOST_RANK = 64


class FinalActivation(StrEnum):
    """The activation of the prompt. The paper uses `relu`, so its prompts are not negative."""

    RELU = "relu"
    TANH = "tanh"
    NONE = "none"


class GeneratorInput(StrEnum):
    """What the generator attends over: the embeddings (the paper) or the input of layer m+1."""

    EMBEDDINGS = "embeddings"
    HIDDEN = "hidden"


class GeneratorPooling(StrEnum):
    """How tokens become one vector: self-attention (the method) or their mean (its ablation)."""

    ATTENTION = "attention"
    MEAN = "mean"


class Pooling(StrEnum):
    """What the head reads from the last layer.

    `answer` is [BOS], at index t (the last token of a causal backbone). `mean` is the mean of the
    text's tokens, without the prompt. `first` is index 0: the first prompt vector if there is a
    prompt, as in PEFT's prompt tuning. `before-last` is the token before the last: for a causal
    backbone the text's own last token, without the one that is added here to read the answer at.
    """

    ANSWER = "answer"
    MEAN = "mean"
    FIRST = "first"
    BEFORE_LAST = "before-last"


class HeadKind(StrEnum):
    """`linear` is one layer. `mlp` is dense, activation, out, as in RoBERTa's classifier."""

    LINEAR = "linear"
    MLP = "mlp"


class HiddenActivation(StrEnum):
    """The activation between the layers of a head of two layers."""

    TANH = "tanh"
    RELU = "relu"
    GELU = "gelu"


class Site(StrEnum):
    """A linear map of a layer, or the activation of its feed-forward part.

    In the order in which a layer applies them. `dense` is the output of attention; `up` and `down`
    are the feed-forward part's; `activated` is the input of `down`.
    """

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    DENSE = "dense"
    UP = "up"
    ACTIVATED = "activated"
    DOWN = "down"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneIdentity(_Frozen):
    """The frozen model that the adapter was trained on.

    Only the fingerprint is compared; the rest is for people.
    """

    name: Text = Field(min_length=1, max_length=256)
    revision: Text | None = Field(default=None, max_length=128)
    fingerprint: Sha256


class Calibration(_Frozen):
    """Scores are `activation(logits / temperature)`."""

    temperature: float = Field(default=1.0, gt=0.0, le=100.0)


class Decision(_Frozen):
    """When the best label is an answer, where a text gets one label.

    abstain_below: a lower score is no answer; None: every score is one. precision: the share of
    right answers for which that was chosen; None if it was set. coverage: what thresholds did on
    the validation rows, the most texts answered first.
    """

    abstain_below: Share | None = None
    precision: float | None = Field(default=None, gt=0.0, lt=1.0)
    coverage: tuple[CoveragePoint, ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.precision is not None and self.abstain_below is None:
            raise ValueError("a precision without abstain_below")
        for (low, more, _), (high, fewer, _) in pairwise(self.coverage):
            if not (low < high and more > fewer):
                raise ValueError("coverage: thresholds must rise, and the shares answered fall")
        return self


class Provenance(_Frozen):
    """Where the adapter comes from.

    Everything is optional: an adapter without a past still serves.
    """

    data: Text | None = None
    data_sha256: Sha256 | None = None
    data_licence: Text | None = None
    command: Text | None = None
    code_version: Text | None = None
    created: Text | None = None
    metrics: dict[Text, float] = Field(default_factory=dict)


# Tokens of a text.
MAX_LENGTH = 8192
Length = Annotated[int, Field(ge=1, le=256)]
Layer = Annotated[int, Field(ge=0, le=255)]
Width = Annotated[int, Field(ge=1, le=16384)]
Shapes: TypeAlias = dict[str, tuple[int, ...]]


class AttentionPrompt(_Frozen):
    """ID-SPAM: a generator attends over the text (`adapters.packed.prompt` has the equation).

    The method's symbols: t = `length`, m = `layer`, c = `bottleneck`, d_k = `attention_size`.
    """

    kind: Literal["attention"] = "attention"
    length: Length
    layer: Layer
    source: GeneratorInput = GeneratorInput.EMBEDDINGS
    pooling: GeneratorPooling = GeneratorPooling.ATTENTION
    bottleneck: int = Field(ge=1, le=8192)
    attention_size: Width
    final_activation: FinalActivation = FinalActivation.RELU

    def shapes(self, n: int) -> Shapes:
        """Its tensors for a backbone of hidden size n."""
        shapes: Shapes = {}
        if self.pooling is GeneratorPooling.ATTENTION:
            d = self.attention_size
            shapes |= {"generator.query": (n, d), "generator.key": (n, d)}
        return shapes | {"generator.value": (n, n)} | _network(n, self.bottleneck, self.length)


class FirstTokenPrompt(_Frozen):
    """LPT: a network makes the prompt from the state of the text's first token at layer m."""

    kind: Literal["first-token"] = "first-token"
    length: Length
    layer: Layer
    bottleneck: int = Field(ge=1, le=8192)

    def shapes(self, n: int) -> Shapes:
        """Its tensors for a backbone of hidden size n."""
        return _network(n, self.bottleneck, self.length)


class RoutedPrompt(_Frozen):
    """SMoP: a router picks one of k prompts by the mean of the embeddings.

    The prompt is multiplied by its share in the router's softmax.
    """

    kind: Literal["routed"] = "routed"
    length: Length
    layer: Layer = 0
    prompts: int = Field(ge=2, le=256)

    def shapes(self, n: int) -> Shapes:
        """Its tensors for a backbone of hidden size n."""
        return {
            "generator.router": (n, self.prompts),
            "generator.bank": (self.prompts, self.length * n),
        }


class EmbeddingTable(_Frozen):
    """DePT: a product of two matrices, a row of which is added to the token at each position.

    Later positions get the last row. width: of the word embeddings.
    """

    positions: int = Field(ge=1, le=8192)
    rank: int = Field(ge=1, le=1024)
    width: Width


class StaticPrompt(_Frozen):
    """The same vectors for every text: prompt tuning, P-tuning without its encoder, DePT.

    shifts_text: the text's positions count from t on, as if the prompt were tokens (PEFT).
    """

    kind: Literal["static"] = "static"
    length: Length
    layer: Layer = 0
    shifts_text: bool = False
    table: EmbeddingTable | None = None

    @model_validator(mode="after")
    def _is_among_the_embeddings(self) -> Self:
        if self.shifts_text and self.layer:
            raise ValueError("shifts_text needs a prompt at layer 0")
        return self

    def shapes(self, n: int) -> Shapes:
        """Its tensors for a backbone of hidden size n."""
        shapes: Shapes = {"prompt.vectors": (self.length, n)}
        if self.table is not None:
            positions, rank, width = self.table.positions, self.table.rank, self.table.width
            shapes |= {"prompt.table.a": (positions, rank), "prompt.table.b": (rank, width)}
        return shapes


Prompt = Annotated[
    AttentionPrompt | FirstTokenPrompt | RoutedPrompt | StaticPrompt, Field(discriminator="kind")
]


def _network(n: int, bottleneck: int, length: int) -> Shapes:
    return {
        "generator.down.weight": (n, bottleneck),
        "generator.down.bias": (bottleneck,),
        "generator.up.weight": (bottleneck, length * n),
        "generator.up.bias": (length * n,),
    }


class _Tuning(_Frozen):
    """layers: the first tuned layer and the one after the last. intermediate_size: f, the width of
    the feed-forward part."""

    layers: tuple[Layer, Annotated[int, Field(ge=1, le=256)]]
    intermediate_size: int = Field(ge=1, le=65536)

    @model_validator(mode="after")
    def _layers_are_a_range(self) -> Self:
        first, end = self.layers
        if first >= end:
            raise ValueError(f"layers {first} to {end - 1} are none")
        return self

    @property
    def depth(self) -> int:
        """Number of tuned layers."""
        return self.layers[1] - self.layers[0]


class VectorTuning(_Tuning):
    """y (1 + s) + b for the outputs of query, key, value and up; y + b for those of down.

    activated: also a (1 + s) for the input of down, as in IA3.
    """

    kind: Literal["vectors"] = "vectors"
    activated: bool = False

    def shapes(self, n: int) -> Shapes:
        """Its tensors for a backbone of hidden size n: s and b of all sites, joined."""
        wide = 3 * n + self.intermediate_size
        shapes: Shapes = {
            "tuning.scale": (self.depth, wide),
            "tuning.bias": (self.depth, wide + n),
        }
        if self.activated:
            shapes["tuning.activated"] = (self.depth, self.intermediate_size)
        return shapes


class LoraTuning(_Tuning):
    """y + scaling (x A) B for the linear maps of `sites` (Hu et al., LoRA, ICLR 2022)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(ge=1, le=MOST_RANK)
    scaling: float = Field(gt=0.0, le=1e6)
    sites: tuple[Site, ...] = Field(min_length=1, max_length=len(Site))

    @model_validator(mode="after")
    def _sites_are_linear_maps(self) -> Self:
        if list(self.sites) != [site for site in Site if site in self.sites]:
            raise ValueError("sites must be distinct and in the order of a layer")
        if Site.ACTIVATED in self.sites:
            raise ValueError(f"{Site.ACTIVATED} is not a linear map")
        return self

    def shapes(self, n: int) -> Shapes:
        """Its tensors for a backbone of hidden size n: A and B of every site."""
        f, shapes = self.intermediate_size, Shapes()
        for site in self.sites:
            inputs, outputs = f if site is Site.DOWN else n, f if site is Site.UP else n
            shapes[f"tuning.{site}.a"] = (self.depth, inputs, self.rank)
            shapes[f"tuning.{site}.b"] = (self.depth, self.rank, outputs)
        return shapes


Tuning = Annotated[VectorTuning | LoraTuning, Field(discriminator="kind")]


class Head(_Frozen):
    """What turns the last layer's states into logits. hidden: only a head of two layers uses it."""

    kind: HeadKind = HeadKind.LINEAR
    pooling: Pooling = Pooling.ANSWER
    hidden: HiddenActivation = HiddenActivation.TANH

    def shapes(self, n: int, labels: int) -> Shapes:
        """Its tensors for a backbone of hidden size n."""
        shapes: Shapes = {}
        if self.kind is HeadKind.MLP:
            shapes |= {"head.dense.weight": (n, n), "head.dense.bias": (n,)}
        return shapes | {"head.out.weight": (n, labels), "head.out.bias": (labels,)}


class AdapterSpec(_Frozen):
    """All that is needed to run an adapter's tensors, and where they come from.

    An adapter is a prompt, a tuning of the layers and a head; it may lack the first two.
    hidden_size: n.
    """

    format_version: Literal[2] = 2
    backbone: BackboneIdentity
    tokenizer_sha256: Sha256
    hidden_size: Width
    prompt: Prompt | None = None
    tuning: Tuning | None = None
    head: Head = Head()
    activation: Literal["softmax", "sigmoid"] = "softmax"
    labels: tuple[Label, ...] = Field(min_length=1, max_length=4096)
    # None also where an answer is one label.
    thresholds: tuple[Threshold, ...] | None = None
    max_length: int = Field(ge=2, le=MAX_LENGTH)
    calibration: Calibration = Calibration()
    # Of sets of labels always None: their thresholds decide.
    decision: Decision | None = None
    # What texts looked like in training, to be compared with those that are served.
    profile: Profile | None = None
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if self.activation == "softmax" and len(self.labels) < 2:
            raise ValueError("softmax needs at least two labels")
        return self

    @model_validator(mode="after")
    def _thresholds_belong_to_the_labels(self) -> Self:
        if self.thresholds is None:
            return self
        if self.activation != "sigmoid":
            raise ValueError(f"thresholds are for sigmoid, activation is {self.activation}")
        if len(self.thresholds) != len(self.labels):
            raise ValueError(f"{len(self.thresholds)} thresholds for {len(self.labels)} labels")
        return self

    @model_validator(mode="after")
    def _a_decision_is_about_one_label(self) -> Self:
        if self.decision is not None and self.activation != "softmax":
            raise ValueError(f"decision is for softmax, activation is {self.activation}")
        return self

    @model_validator(mode="after")
    def _a_profile_is_of_these_labels(self) -> Self:
        if self.profile is None:
            return self
        if fault := self.profile.fault(len(self.labels), several=self.multi_label):
            raise ValueError(fault)
        return self

    @property
    def abstain_below(self) -> float | None:
        """The score below which the best label is no answer; None: it always is one."""
        return None if self.decision is None else self.decision.abstain_below

    @property
    def multi_label(self) -> bool:
        """Whether an answer is a set of labels: those whose scores reach their thresholds."""
        return self.activation == "sigmoid"

    @property
    def label_thresholds(self) -> tuple[float, ...]:
        """The score that each label needs; `DEFAULT_THRESHOLD` where the file has none."""
        return self.thresholds or (DEFAULT_THRESHOLD,) * len(self.labels)

    def label_set(self, scores: Sequence[float]) -> list[str]:
        """The labels whose scores reach their thresholds, the best first; possibly none.

        Of equal scores the earlier label comes first.

        Args:
            scores: of one text, in the order of `labels`.
        """
        thresholds = self.label_thresholds
        reached = [
            index
            for index, (score, threshold) in enumerate(zip(scores, thresholds, strict=True))
            if score >= threshold
        ]
        # The sort is stable in reverse as well.
        reached.sort(key=scores.__getitem__, reverse=True)
        return [self.labels[index] for index in reached]

    @property
    def method(self) -> str:
        """A short name of what is trained: `idspam`, `idspam+vectors`, `lora`, `head`."""
        parts = [
            _METHOD_NAMES[part.kind] for part in (self.prompt, self.tuning) if part is not None
        ]
        return "+".join(parts) or "head"

    @property
    def prompt_length(self) -> int:
        """t, 0 without a prompt."""
        return 0 if self.prompt is None else self.prompt.length

    @property
    def positions(self) -> int:
        """The most positions that a text needs of the backbone: `max_length`, and t if the prompt
        shifts it."""
        shifts = isinstance(self.prompt, StaticPrompt) and self.prompt.shifts_text
        return self.max_length + (self.prompt_length if shifts else 0)

    def shapes(self) -> Shapes:
        """Name and shape of every tensor of an adapter with this spec."""
        n = self.hidden_size
        shapes = self.head.shapes(n, len(self.labels))
        for part in (self.prompt, self.tuning):
            if part is not None:
                shapes = part.shapes(n) | shapes
        return shapes

    def to_json(self) -> str:
        """The metadata value of an adapter file."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse strictly: unknown or repeated fields and wrong types are faults.

        A spec of format version 1 becomes one of version 2 with the same meaning.

        Raises:
            InvalidAdapter: with one fault for each field.
        """
        try:
            fields = json.loads(text, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            raise InvalidAdapter([f"spec: {error}"]) from None
        version = fields.get("format_version", 1) if isinstance(fields, dict) else 2
        if type(version) is not int or version not in (1, 2):
            raise InvalidAdapter(["spec: format_version: expected the integer 1 or 2"])
        try:
            if version == 1:
                return cls(**_SpecOfVersion1.model_validate_json(text, strict=True).parts())
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise InvalidAdapter([_fault(detail) for detail in error.errors()]) from None


_METHOD_NAMES = {
    "attention": "idspam",
    "first-token": "lpt",
    "routed": "smop",
    "static": "prompt-tuning",
    "vectors": "vectors",
    "lora": "lora",
}


class _SpecOfVersion1(_Frozen):
    """The fields of format version 1, in which every adapter has ID-SPAM's prompt."""

    format_version: Literal[1] = 1
    method: Literal["idspam"] = "idspam"
    backbone: BackboneIdentity
    tokenizer_sha256: Sha256
    hidden_size: Width
    prompt_length: Length
    bottleneck: int = Field(ge=1, le=8192)
    attention_size: Width
    insertion_layer: Layer
    generator_input: GeneratorInput = GeneratorInput.EMBEDDINGS
    generator_pooling: GeneratorPooling = GeneratorPooling.ATTENTION
    final_activation: FinalActivation = FinalActivation.RELU
    pooling: Literal[Pooling.ANSWER, Pooling.MEAN] = Pooling.ANSWER
    head: HeadKind = HeadKind.LINEAR
    activation: Literal["softmax", "sigmoid"] = "softmax"
    labels: tuple[Label, ...] = Field(min_length=1, max_length=4096)
    thresholds: tuple[Threshold, ...] | None = None
    max_length: int = Field(ge=2, le=MAX_LENGTH)
    calibration: Calibration = Calibration()
    provenance: Provenance = Provenance()

    def parts(self) -> dict[str, Any]:
        """The fields of `AdapterSpec`."""
        prompt = AttentionPrompt(
            length=self.prompt_length,
            layer=self.insertion_layer,
            source=self.generator_input,
            pooling=self.generator_pooling,
            bottleneck=self.bottleneck,
            attention_size=self.attention_size,
            final_activation=self.final_activation,
        )
        shared = AdapterSpec.model_fields.keys() & type(self).model_fields.keys()
        shared -= {"format_version", "head"}
        fields = {name: getattr(self, name) for name in shared}
        return fields | {"prompt": prompt, "head": Head(kind=self.head, pooling=self.pooling)}


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, which silently drops all but the last entry of a repeated key.

    Raises:
        ValueError: with the repeated keys.
    """
    counts = Counter(key for key, _ in pairs)
    if repeated := sorted(key for key, count in counts.items() if count > 1):
        raise ValueError(f"repeated keys: {listing(repeated)}")
    return dict(pairs)


def _fault(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"]) or "spec"
    return f"spec: {field}: {error['msg']}"


def embedding_spec(
    identity: BackboneIdentity, tokenizer_sha256: str, *, hidden_size: int, max_tokens: int
) -> AdapterSpec:
    """The spec of rows whose answer is their vector. They have no labels; a spec needs one.

    Args:
        max_tokens: that the backbone takes.
    """
    return AdapterSpec(
        backbone=identity,
        tokenizer_sha256=tokenizer_sha256,
        hidden_size=hidden_size,
        head=Head(pooling=Pooling.MEAN),
        activation="sigmoid",
        labels=("embedding",),
        max_length=min(max_tokens, MAX_LENGTH),
    )
