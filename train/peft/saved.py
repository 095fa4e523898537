"""The model that a folder of PEFT stands for: PEFT's own, with the folder's weights in it."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from adapters.backbone.loading import locate
from adapters.backbone.model import Backbone
from train.peft.folder import PeftFolder
from train.peft.names import NAMES, Names

ADAPTER = "default"  # PEFT's name for the one adapter
# What PEFT raises for settings that make no sense.
_SENSELESS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    re.error,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class SavedModel:
    """PEFT's model for sequence classification, float32 on the CPU, in evaluation mode.

    problem_type: of the base model's configuration.
    """

    folder: PeftFolder
    model: Any
    names: Names
    outputs: int
    problem_type: str | None

    @property
    def changed(self) -> Mapping[str, BaseTunerLayer]:
        """The modules that PEFT has changed, by their names in the base model."""
        return {
            name: module
            for name, module in self.model.get_base_model().named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    @staticmethod
    def is_exactly(module: object, kind: type[object]) -> bool:
        """Whether it is of this class: a subclass of PEFT's computes something else."""
        return type(module) is kind

    def module(self, name: str) -> nn.Module:
        """A module of the base model, or the trained copy of it."""
        module: Any = self.model.get_base_model()
        for part in name.split("."):
            module = _trained(getattr(module, part))
        found: nn.Module = _trained(module)
        return found


def load(folder: PeftFolder, backbone: Backbone) -> SavedModel:
    """Build PEFT's model on the base model that `backbone` was loaded from.

    Raises:
        PeftError: the weights are not exactly those that PEFT expects for this base model, or the
            head is not complete.
    """
    names = NAMES[backbone.model_type]
    base, config, absent = _base(folder, backbone, names)
    with quietly():
        try:
            parse: Any = peft.PeftConfig.from_peft_type
            settings = parse(**{**folder.config, "inference_mode": True})
            if settings.peft_type == peft.PeftType.LORA:
                settings.init_lora_weights = True
                settings.loftq_config = {}
            model: Any = peft.get_peft_model(base, settings, ADAPTER)
        except _SENSELESS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"PEFT cannot apply it to {backbone.identity.name!r}: {reason}"
            raise folder.fault(message) from None
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in get_peft_model_state_dict(
                model, adapter_name=ADAPTER, save_embedding_layers=False
            ).items()
        }
        _check_weights(folder, expected, backbone, names)
        set_peft_model_state_dict(model, dict(folder.tensors), ADAPTER)
    if backbone.family.causal:
        # It reads the last token that is not padding. One text at a time needs no padding.
        model.config.pad_token_id = None
    _check_trained_modules(folder, model, names)
    _check_head(folder, names, absent)
    problem = folder.model_config.get("problem_type") or config.problem_type
    return SavedModel(folder, model.eval(), names, int(config.num_labels), problem)


def _base(folder: PeftFolder, backbone: Backbone, names: Names) -> tuple[Any, Any, set[str]]:
    """The base model, its configuration, and the weights that its files do not have."""
    source, revision = locate(backbone.identity.name)
    out = [name for name in folder.tensors if name.endswith(f".{names.out}.weight")]
    # Other shapes than [outputs, inputs] are refused later, with those of all weights.
    shape = folder.tensors[out[0]].shape if out else ()
    labels = {"num_labels": shape[0]} if shape else {}
    with quietly():
        config = AutoConfig.from_pretrained(source, revision=revision, **labels)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            revision=revision,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return model, config, set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}


def _check_weights(
    folder: PeftFolder, expected: Mapping[str, tuple[int, ...]], backbone: Backbone, names: Names
) -> None:
    base = f"a {backbone.model_type} of {backbone.layers} layers, {backbone.identity.name!r}"
    missing = sorted(expected.keys() - folder.tensors.keys())
    unknown = sorted(folder.tensors.keys() - expected.keys())
    heads = [name for name in missing if any(f".{part}." in name for part in names.head)]
    if heads and not unknown:
        raise folder.fault(
            f"has no head: {heads[0]} is missing; save a model with task_type SEQ_CLS"
        )
    faults = [
        f"{verb} tensors: {len(keys)}, the first is {keys[0]}"
        for keys, verb in ((missing, "missing"), (unknown, "unknown"))
        if keys
    ]
    faults += [
        f"{name} has the shape {list(folder.tensors[name].shape)}, not {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in folder.tensors and tuple(folder.tensors[name].shape) != shape
    ][:3]
    if faults:
        raise folder.fault(f"the weights do not fit {base}: {'; '.join(faults)}")


def _check_trained_modules(folder: PeftFolder, model: Any, names: Names) -> None:
    """Refuse trained copies of modules that are not the head."""
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        own = [f"{name}.{each}" for each, _ in module.original_module.named_parameters()]
        if foreign := [each for each in own if not each.startswith(_prefixes(names))]:
            raise folder.fault(
                f"modules_to_save has {name}, and {foreign[0]} is not part of the head: all "
                "adapters share the base model"
            )


def _check_head(folder: PeftFolder, names: Names, absent: set[str]) -> None:
    """Refuse a head with weights that are neither in the folder nor in the base model."""
    for key in sorted(absent):
        if key.startswith(_prefixes(names)) and not any(
            name.endswith(f".{key}") for name in folder.tensors
        ):
            part = key.rpartition(".")[0]
            raise folder.fault(
                f"has no head: neither the folder nor the base model has {key}, so it was random "
                f"in training and is lost; train with modules_to_save=[{part.split('.')[-1]!r}]"
                if not part.endswith("pooler.dense")
                else f"the head's pooler is lost: neither the folder nor the base model has {key}; "
                "train with modules_to_save=['pooler']"
            )


def _prefixes(names: Names) -> tuple[str, ...]:
    return tuple(f"{part}." for part in names.head)


def _trained(module: Any) -> Any:
    if isinstance(module, AuxiliaryTrainingWrapper):
        copies: Any = module.modules_to_save
        return copies[ADAPTER]
    return module


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' remarks: new heads are the rule here, and all else is checked."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
