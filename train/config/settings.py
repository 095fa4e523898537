"""Every setting of `fit` in one table: name, type, default, range and help.

The command line is made from it. Where a default is None, training chooses the value
(`train.config.defaults` and `train.config.recipe`), and the help says what the choice depends on.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_type_hints

from adapters.format.spec import (
    MOST_RANK,
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    HeadKind,
    Pooling,
    Site,
)
from train.errors import SettingsError


class CacheMode(StrEnum):
    """Where states below the insertion layer are kept. `auto`: memory if they fit, else disk."""

    AUTO = "auto"
    MEMORY = "memory"
    DISK = "disk"
    OFF = "off"


class ComputeType(StrEnum):
    """The type the backbone computes in. `auto`: bfloat16 if the device has it and parity holds.

    `int8` and `float8` have no gradients: only what answers texts can use them.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FLOAT8 = "float8"


class MethodName(StrEnum):
    """What `fit` trains: members of one family of adapters. `best` compares some of them."""

    IDSPAM = "idspam"
    IDSPAM_VECTORS = "idspam+vectors"
    VECTORS = "vectors"
    LORA = "lora"
    HEAD_ONLY = "head-only"
    PROMPT_TUNING = "prompt-tuning"
    P_TUNING = "p-tuning"
    SMOP = "smop"
    LPT = "lpt"
    DEPT = "dept"
    BEST = "best"


class Preset(StrEnum):
    """Default switches of ID-SPAM: the best measured ones (docs/research.md), or the paper's."""

    BEST = "best"
    PAPER = "paper"


class StorageType(StrEnum):
    """The tensors' type in the file. `auto`: float16 if that moves no answer past a bound."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers that a setting allows: `least` and `most` are included, the others not."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def fault(self, value: float) -> str | None:
        """What is wrong with a value, or None."""
        if not math.isfinite(value):
            return "must be a finite number"
        if value < self.least:
            return f"must be at least {self.least:g}"
        if value <= self.above:
            return f"must be greater than {self.above:g}"
        if value > self.most:
            return f"must be at most {self.most:g}"
        if value >= self.below:
            return f"must be less than {self.below:.0f}"
        return None


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting's help, range and flag; its type and default are those of the field.

    otherwise: what is used where the default is None. flag: if it differs from the name.
    """

    help: str
    range: Range | None = None
    otherwise: str | None = None
    flag: str | None = None


_COUNT = Range(least=1)
_SHARE = Range(least=0, below=1)
_BY_SIZE = "from the data's size"
_BY_PRESET = "from the method and the preset"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How one adapter is trained.

    Raises:
        SettingsError: lists every value that is out of range.
    """

    backbone: Annotated[
        str | None,
        Setting(
            "the frozen model: a folder, hub name or hub name@revision",
            otherwise="all-MiniLM-L6-v2",
        ),
    ] = None
    device: Annotated[str, Setting("auto (a GPU if there is one), cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[
        ComputeType | None,
        Setting("type that the backbone computes in", otherwise="float32 on a CPU, auto on a GPU"),
    ] = None
    method: Annotated[
        MethodName | None,
        Setting(
            "what is trained in front of or inside the frozen layers; best: several methods, of"
            " which the best on the validation rows is kept",
            otherwise="idspam+vectors, and idspam with --preset paper",
        ),
    ] = None
    preset: Annotated[
        Preset,
        Setting("default switches of ID-SPAM: the best measured, or the paper's literal method"),
    ] = Preset.BEST

    epochs: Annotated[
        int | None, Setting("maximum number of passes over the data", _COUNT, _BY_SIZE)
    ] = None
    batch_size: Annotated[int | None, Setting("texts in a step", _COUNT, _BY_SIZE)] = None
    micro_batch: Annotated[
        int | None,
        Setting(
            "texts whose gradients are computed at once, if a whole batch does not fit",
            _COUNT,
            "the whole batch",
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        Setting(
            "AdamW's peak learning rate",
            Range(above=0, most=10),
            "from the method, the preset and the number of labels",
            flag="--lr",
        ),
    ] = None
    tuning_rate: Annotated[
        float | None,
        Setting(
            "the learning rate of vectors or LoRA's matrices",
            Range(above=0, most=10),
            "from the method, in proportion to --lr",
            flag="--tuning-lr",
        ),
    ] = None
    warmup_ratio: Annotated[
        float,
        Setting("share of all steps in which the learning rate rises", _SHARE, flag="--warmup"),
    ] = 0.06
    weight_decay: Annotated[
        float | None,
        Setting(
            "AdamW's weight decay",
            Range(least=0, most=100),
            "from the method, the preset and the size of the data",
        ),
    ] = None
    dropout: Annotated[
        float,
        Setting(
            "share of the values before the head, and before LoRA's matrices, that is dropped"
            " during training",
            _SHARE,
        ),
    ] = 0.1
    hidden_dropout: Annotated[
        float | None,
        Setting(
            "share of what each trained layer adds to its input that is dropped during training",
            _SHARE,
            "0.1 with vectors, else 0",
        ),
    ] = None
    patience: Annotated[
        int | None,
        Setting(
            "epochs without a better validation result after which the run stops",
            _COUNT,
            "from the number of epochs",
        ),
    ] = None
    seed: Annotated[
        int,
        Setting(
            "seed of initial weights, order of rows, dropout and split", Range(least=0, below=2**32)
        ),
    ] = 13

    prompt_length: Annotated[
        int | None, Setting("t: soft prompt vectors per text", Range(least=1, most=256), _BY_PRESET)
    ] = None
    bottleneck: Annotated[
        int | None,
        Setting("c: width between W_down and W_up", Range(least=1, most=8192), _BY_PRESET),
    ] = None
    attention_size: Annotated[
        int | None,
        Setting("d_k: width of queries and keys", Range(least=1, most=16384), "the hidden size"),
    ] = None
    insertion_layer: Annotated[
        int | None,
        Setting(
            "m: the layer whose input gets the prompt; 0: the embeddings",
            Range(least=0, most=255),
            "two thirds of the backbone's layers with vectors, else half",
        ),
    ] = None
    generator_input: Annotated[
        GeneratorInput | None, Setting("what the generator attends over", otherwise=_BY_PRESET)
    ] = None
    generator_pooling: Annotated[
        GeneratorPooling, Setting("how the generator turns the tokens into one vector")
    ] = GeneratorPooling.ATTENTION
    final_activation: Annotated[
        FinalActivation | None,
        Setting("the last activation of the generator", otherwise=_BY_PRESET),
    ] = None
    tuned_layers: Annotated[
        str | None,
        Setting(
            "FIRST-LAST: the layers with vectors or LoRA's matrices, counted from 0",
            otherwise="all",
        ),
    ] = None
    rank: Annotated[
        int | None, Setting("r: of LoRA's matrices", Range(least=1, most=MOST_RANK), "8")
    ] = None
    alpha: Annotated[
        float | None,
        Setting("LoRA's changes are multiplied by alpha / r", Range(above=0, most=1e6), "2 r"),
    ] = None
    sites: Annotated[
        str | None,
        Setting(
            "the linear maps with LoRA's matrices, of query, key, value, dense, up and down,"
            " separated by commas",
            otherwise="query,value",
        ),
    ] = None
    pooling: Annotated[
        Pooling | None, Setting("what the head reads from the last layer", otherwise=_BY_PRESET)
    ] = None
    head: Annotated[HeadKind | None, Setting("kind of class head", otherwise=_BY_PRESET)] = None
    max_length: Annotated[
        int | None,
        Setting(
            "maximum tokens per text; longer texts are cut",
            Range(least=2, most=8192),
            "the backbone's maximum",
        ),
    ] = None

    validation_fraction: Annotated[
        float, Setting("share of --train held out if no --validation is given", _SHARE)
    ] = 0.1
    drop_leaks: Annotated[
        bool,
        Setting(
            "train without rows that repeat a validation or test row, and without equal texts that "
            "have different labels; by default they are only reported"
        ),
    ] = False
    calibration: Annotated[
        bool,
        Setting(
            "fit the temperature of the scores on the validation rows, and keep it if it lowers "
            "their calibration error"
        ),
    ] = True
    precision: Annotated[
        float | None,
        Setting(
            "share of the answers that is to be right: chooses, on the validation rows, the score "
            "below which the adapter abstains",
            Range(above=0, below=1),
            "it never abstains",
        ),
    ] = None
    abstain_below: Annotated[
        float | None,
        Setting(
            "score below which the adapter abstains",
            Range(above=0, below=1),
            "it never abstains",
        ),
    ] = None
    cache: Annotated[
        CacheMode, Setting("where states below the insertion layer are kept between epochs")
    ] = CacheMode.AUTO
    storage_dtype: Annotated[StorageType, Setting("type of the tensors in the file")] = (
        StorageType.AUTO
    )
    init_from: Annotated[
        str | None,
        Setting(
            "an adapter file to start from: its prompt and tuning, its head if the labels are the"
            " same, and its switches where yours are left open",
            otherwise="random weights",
        ),
    ] = None
    search: Annotated[
        int | None,
        Setting(
            "number of trials with other settings, compared on the validation rows; settings given"
            " here stay fixed",
            Range(least=1, most=1000),
            "no search",
        ),
    ] = None
    resume: Annotated[
        bool, Setting("continue from the state that an interrupted run left beside its output")
    ] = False

    data_name: Annotated[
        str | None, Setting("name of the data in the provenance", otherwise="the file's name")
    ] = None
    data_licence: Annotated[
        str | None, Setting("licence of the data in the provenance", otherwise="none stated")
    ] = None
    # Not flags: the command line, for the provenance, and the names of the settings in it.
    command: str | None = None
    given: tuple[str, ...] = ()

    def is_open(self, name: str) -> bool:
        """Whether the user left this setting open, so that training may choose it."""
        default = next(field.default for field in fields(self) if field.name == name)
        return name not in self.given and bool(getattr(self, name) == default)

    def __post_init__(self) -> None:
        faults = []
        for entry in entries():
            value, allowed = getattr(self, entry.name), entry.setting.range
            if allowed is None or value is None:
                continue
            if (fault := allowed.fault(value)) is not None:
                faults.append(f"{entry.flag} {fault}, not {value}")
        if self.dtype in (ComputeType.INT8, ComputeType.FLOAT8):
            faults.append(
                f"--dtype {self.dtype} cannot train: its products have no gradients (evaluate and "
                "profile take it)"
            )
        if self.precision is not None and self.abstain_below is not None:
            faults.append("--precision chooses what --abstain-below sets: give one of them")
        for flag, text, parse in (
            ("--tuned-layers", self.tuned_layers, parse_layers),
            ("--sites", self.sites, parse_sites),
        ):
            try:
                if text is not None:
                    parse(text)
            except ValueError as error:
                faults.append(f"{flag} {text}: {error}")
        if faults:
            raise SettingsError(faults)


def parse_layers(text: str) -> tuple[int, int]:
    """`FIRST-LAST` as the first layer and the one after the last.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch("([0-9]{1,3})-([0-9]{1,3})", text, re.ASCII)
    if match is None:
        raise ValueError("expected FIRST-LAST, as in 0-5")
    first, last = map(int, match.groups())
    if first > last:
        raise ValueError("the first layer is above the last one")
    return first, last + 1


def parse_sites(text: str) -> tuple[Site, ...]:
    """Linear maps of a layer, separated by commas, in the order of a layer.

    Raises:
        ValueError: one is unknown or occurs twice.
    """
    linear = [site for site in Site if site is not Site.ACTIVATED]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in linear:
            raise ValueError(f"{name or 'nothing'} is none of {', '.join(linear)}")
        if names.count(name) > 1:
            raise ValueError(f"{name} twice")
    return tuple(site for site in linear if site in names)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table: a setting of `FitSettings`. kind: its type without None."""

    name: str
    kind: type[Any]
    default: Any
    setting: Setting

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return self.setting.flag or "--" + self.name.replace("_", "-")


def entries() -> Iterator[Entry]:
    """All settings that have a flag, in the order of the help."""
    hints = get_type_hints(FitSettings, include_extras=True)
    for field in fields(FitSettings):
        kind, *annotations = get_args(hints[field.name]) or (None,)
        for setting in annotations:
            if isinstance(setting, Setting):
                yield Entry(field.name, _without_none(kind), field.default, setting)


def _without_none(hint: Any) -> type[Any]:
    kinds: tuple[Any, ...] = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind: type[Any] = next(kind for kind in kinds if kind is not NoneType)
    return kind
