"""From a folder of PEFT to an adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from adapters import __version__
from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone
from adapters.errors import with_escapes
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec, Provenance
from train.peft.base_model import backbone_name, check_base_model
from train.peft.check import check_scores
from train.peft.folder import read_folder
from train.peft.heads import head_of
from train.peft.options import PROMPT_TYPES, check_options
from train.peft.prompts import prompt_of
from train.peft.saved import SavedModel, load
from train.peft.tuning import ia3_tuning, lora_tuning


@dataclass(frozen=True, slots=True)
class Imported:
    """An adapter, and the largest difference of its scores from PEFT's on a few texts."""

    adapter: Adapter
    difference: float


def import_peft(
    path: Path,
    labels: Sequence[str],
    *,
    backbone: str | None = None,
    same_base_model: bool = False,
    multi_label: bool = False,
    max_length: int | None = None,
    end_token: bool = False,
    command: str | None = None,
) -> Imported:
    """Make an adapter of a folder that PEFT's `save_pretrained` has written.

    Args:
        labels: their names, in the order of the model's outputs.
        backbone: where the base model is; default: where the folder says.
        same_base_model: the backbone is the base model, even if the folder has another name for it.
        multi_label: scores by sigmoid, also if the base model's configuration does not say so.
        max_length: tokens of a text at most; default: all that the backbone takes.
        end_token: texts of training ended with `<|endoftext|>`, as those here do (GPT-2).

    Raises:
        PeftError: the folder cannot be read, or cannot be served exactly.
        UnusableBackbone, UnsupportedBackbone: as `load_backbone`.
    """
    folder = read_folder(path)
    check_options(folder)
    host = load_backbone(backbone_name(folder, backbone), device="cpu")
    if not same_base_model:
        check_base_model(folder, host)
    saved = load(folder, host)
    activation = _activation(saved, multi_label=multi_label)
    if end_token and not host.family.causal:
        raise folder.fault(f"--end-token is for GPT-2, the base model is a {host.model_type}")
    _check_labels(saved, labels)
    parts, tensors = _parts(saved, host, end_token=end_token)
    prompt = parts["prompt"]
    room = host.max_tokens - (0 if prompt is None else prompt.length)
    if max_length is not None and max_length > room:
        raise folder.fault(f"--max-length {max_length}; the backbone has room for {room} tokens")
    try:
        spec = AdapterSpec(
            backbone=host.identity,
            tokenizer_sha256=host.encoder.sha256,
            hidden_size=host.hidden_size,
            activation=activation,
            labels=tuple(labels),
            max_length=room if max_length is None else max_length,
            provenance=Provenance(
                command=None if command is None else with_escapes(command),
                code_version=__version__,
                created=datetime.now(UTC).replace(microsecond=0).isoformat(),
            ),
            **parts,
        )
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'adapter'}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise folder.fault("; ".join(faults)) from None
    adapter = Adapter(spec, tensors)
    return Imported(adapter, check_scores(adapter, host, saved))


def _parts(
    saved: SavedModel, backbone: Backbone, *, end_token: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Prompt, tuning and head of the spec, and their tensors."""
    kind = saved.folder.config["peft_type"]
    prompted = kind in PROMPT_TYPES
    head, tensors = head_of(saved, prompted=prompted, end_token=end_token)
    parts: dict[str, Any] = {"prompt": None, "tuning": None, "head": head}
    if prompted:
        parts["prompt"], more = prompt_of(saved, backbone)
        return parts, tensors | more
    tuning = (lora_tuning if kind == "LORA" else ia3_tuning)(saved, backbone)
    if tuning is None:
        return parts, tensors
    parts["tuning"], more = tuning
    return parts, tensors | more


def _activation(saved: SavedModel, *, multi_label: bool) -> str:
    if multi_label or saved.problem_type == "multi_label_classification":
        return "sigmoid"
    if saved.problem_type == "regression" or saved.outputs == 1:
        raise saved.folder.fault(
            "a regression has no labels; for a head of one output that was trained as one of "
            "several labels (BCEWithLogitsLoss), add --multi-label"
        )
    return "softmax"


def _check_labels(saved: SavedModel, labels: Sequence[str]) -> None:
    if len(labels) != saved.outputs:
        raise saved.folder.fault(f"the head has {saved.outputs} outputs, --labels {len(labels)}")
