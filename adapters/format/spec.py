"""The adapter spec: the configuration that an adapter file declares."""

import json
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from adapters.errors import InvalidAdapter, is_control, listing

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


def _integer(value: object) -> object:
    # `Literal[1]` alone accepts all that equals 1.
    if type(value) is not int:
        raise ValueError("expected the integer 1")
    return value


Version = Annotated[Literal[1], BeforeValidator(_integer)]


# A score of 0 or 1 would give a label to every text or to none.
Threshold = Annotated[float, Field(gt=0.0, lt=1.0)]
DEFAULT_THRESHOLD = 0.5


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
    text's tokens, without the prompt.
    """

    ANSWER = "answer"
    MEAN = "mean"


class HeadKind(StrEnum):
    """`linear` is one layer. `mlp` is dense, tanh, out, as in RoBERTa's classifier."""

    LINEAR = "linear"
    MLP = "mlp"


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


class AdapterSpec(_Frozen):
    """All that is needed to run an adapter's tensors, and where they come from.

    The method's symbols: n = `hidden_size`, t = `prompt_length`, c = `bottleneck`,
    m = `insertion_layer`, d_k = `attention_size`.
    """

    format_version: Version = 1
    method: Literal["idspam"] = "idspam"
    backbone: BackboneIdentity
    tokenizer_sha256: Sha256
    hidden_size: int = Field(ge=1, le=16384)
    prompt_length: int = Field(ge=1, le=256)
    bottleneck: int = Field(ge=1, le=8192)
    attention_size: int = Field(ge=1, le=16384)
    insertion_layer: int = Field(ge=0, le=255)
    generator_input: GeneratorInput = GeneratorInput.EMBEDDINGS
    generator_pooling: GeneratorPooling = GeneratorPooling.ATTENTION
    final_activation: FinalActivation = FinalActivation.RELU
    pooling: Pooling = Pooling.ANSWER
    head: HeadKind = HeadKind.LINEAR
    activation: Literal["softmax", "sigmoid"] = "softmax"
    labels: tuple[Label, ...] = Field(min_length=1, max_length=4096)
    # None also where an answer is one label. It is then not written: see `to_json`.
    thresholds: tuple[Threshold, ...] | None = None
    max_length: int = Field(ge=2, le=8192)
    calibration: Calibration = Calibration()
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of an adapter with this spec."""
        n, t, c, d = self.hidden_size, self.prompt_length, self.bottleneck, self.attention_size
        labels = len(self.labels)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.generator_pooling is GeneratorPooling.ATTENTION:
            shapes |= {"generator.query": (n, d), "generator.key": (n, d)}
        shapes |= {
            "generator.value": (n, n),
            "generator.down.weight": (n, c),
            "generator.down.bias": (c,),
            "generator.up.weight": (c, t * n),
            "generator.up.bias": (t * n,),
        }
        if self.head is HeadKind.MLP:
            shapes |= {"head.dense.weight": (n, n), "head.dense.bias": (n,)}
        return shapes | {"head.out.weight": (n, labels), "head.out.bias": (labels,)}

    def to_json(self) -> str:
        """The metadata value of an adapter file.

        Without thresholds it has no such field, so readers that do not have the field take it.
        """
        return self.model_dump_json(exclude={"thresholds"} if self.thresholds is None else None)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse strictly: unknown or repeated fields and wrong types are faults.

        Raises:
            InvalidAdapter: with one fault for each field.
        """
        try:
            json.loads(text, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            raise InvalidAdapter([f"spec: {error}"]) from None
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise InvalidAdapter([_fault(detail) for detail in error.errors()]) from None


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
