"""Which settings of an `adapter_config.json` can be served exactly.

A setting that is not listed must have PEFT's default, so what a later PEFT adds is refused by name
and not ignored.
"""

from dataclasses import MISSING, fields
from typing import Any

import peft

from adapters.errors import listing
from train.peft.folder import PeftFolder

_COMMON = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
_TARGETS = {"exclude_modules", "fan_in_fan_out", "target_modules"}
_PROMPTS = {
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "token_dim",
}
# By type of PEFT: the settings that may have any value. The checks of `saved` and `tuning` follow.
_TAKEN: dict[str, set[str]] = {
    "LORA": _COMMON
    | _TARGETS
    | {
        "alpha_pattern",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "use_rslora",
        # They matter only where weights start.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
    },
    "IA3": _COMMON | _TARGETS | {"feedforward_modules", "init_ia3_weights"},
    "PROMPT_TUNING": _COMMON
    | _PROMPTS
    | {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    },
    # The file has what the encoder makes, not the encoder.
    "P_TUNING": _COMMON
    | _PROMPTS
    | {
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
    },
}
PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING")

_REASONS = {
    "alora_invocation_tokens": "changes only some tokens",
    "bias": "trained biases of the base model have no place in an adapter beside LoRA",
    "layer_replication": "changes the number of layers",
    "lora_bias": "LoRA's matrices have no biases here",
    "target_parameters": "only linear layers can be changed",
    "trainable_token_indices": "the embeddings are shared by all adapters",
    "use_dora": "DoRA divides by a norm of the changed weights",
    "use_qalora": "the base model is not quantised here",
}

# Others change the base model's weights or how they are used.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def check_options(folder: PeftFolder) -> None:
    """Refuse what cannot be served exactly.

    Raises:
        PeftError: with every such setting.
    """
    config = folder.config
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _TAKEN:
        raise folder.fault(f"peft_type {kind!r} cannot be imported; {listing(sorted(_TAKEN))} can")
    _check_task(folder)
    defaults = _defaults(kind)
    faults = []
    for name, value in sorted(config.items()):
        if name in _TAKEN[kind] or _is_empty(value) or value == defaults.get(name):
            continue
        reason = _REASONS.get(name, "" if name in defaults else "this PEFT does not know it")
        faults.append(f"{name}={value!r}" + (f" ({reason})" if reason else ""))
    start = config.get("init_lora_weights", True)
    if kind == "LORA" and start not in _STARTS:
        faults.append(
            f"init_lora_weights={start!r} (it changes the base model's weights; save with "
            "path_initial_model_for_weight_conversion)"
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        faults.append("num_transformer_submodules (only encoders have one prompt)")
    if faults:
        raise folder.fault(f"cannot be served exactly: {'; '.join(faults)}")


def _check_task(folder: PeftFolder) -> None:
    task = folder.config.get("task_type")
    if task == peft.TaskType.SEQ_CLS.value:
        return
    mapping = folder.config.get("auto_mapping")
    model = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    if task is None and model.endswith("ForSequenceClassification"):
        if folder.config["peft_type"] in PROMPT_TYPES:
            raise folder.fault("a prompt without a task_type does nothing in PEFT")
        return
    raise folder.fault(
        f"task_type {task!r} has no scores for labels; only {peft.TaskType.SEQ_CLS.value} can be "
        "imported"
    )


def _defaults(kind: str) -> dict[str, Any]:
    config: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    defaults = {}
    for field in fields(config):
        default = field.default
        if default is MISSING:
            default = None if field.default_factory is MISSING else field.default_factory()
        defaults[field.name] = default
    return defaults


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ([], {}, "")
