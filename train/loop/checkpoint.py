"""Checkpoints: an interrupted run's state, in a file beside its output, to resume it from.

The order of rows, dropout and the learning rate are functions of seed and step. So weights, moments
and counters are enough, and on a CPU a resumed run ends with the bits of an uninterrupted one.
The file is safetensors: reading it runs no pickled code.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adapters.format.durable import write_atomically
from train.errors import ResumeError
from train.loop.identity import Identity, decode_identity, differences, refusal
from train.loop.progress import EpochReport

_PARTS = ("weights", "best", "exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Checkpoint:
    """How far a run is, apart from its tensors.

    epoch: finished epochs. step: finished steps of the current epoch, whose sums so far are in
    `running`. best_score: metric and negative loss on the validation rows after `best_epoch`.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_score: tuple[float, float] = (-1.0, 0.0)
    seconds: float = 0.0
    running: dict[str, float] = field(
        default_factory=lambda: {"loss": 0.0, "hits": 0.0, "texts": 0.0, "seconds": 0.0}
    )
    history: list[EpochReport] = field(default_factory=list)


def checkpoint_path(output: Path) -> Path:
    """The checkpoint of the run that writes `output`."""
    return output.with_name(output.name + ".state")


def saved_identity(path: Path) -> Identity:
    """Of the run that wrote a checkpoint, without its tensors; empty if the file cannot tell."""
    try:
        with safe_open(path, framework="pt") as file:
            return decode_identity((file.metadata() or {}).get("run", ""))
    except (SafetensorError, OSError):
        return {}


def save_checkpoint(
    path: Path,
    checkpoint: Checkpoint,
    *,
    run: str,
    weights: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything that `load_checkpoint` needs, atomically.

    Args:
        run: its encoded identity. A checkpoint of another run is refused.
    """
    tensors = {f"weights/{name}": tensor.detach() for name, tensor in weights.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    steps = 0.0
    for name, tensor in weights.items():
        moments = optimizer.state.get(tensor, {})
        steps = float(moments.get("step", 0.0))
        for part in ("exp_avg", "exp_avg_sq"):
            if part in moments:
                tensors[f"{part}/{name}"] = moments[part]
    metadata = {"run": run, "state": json.dumps(asdict(checkpoint)), "steps": str(steps)}
    on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    write_atomically(path, save(on_cpu, metadata=metadata))


def load_checkpoint(
    path: Path, *, run: str, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Put weights and moments back; returns the counters and the best weights so far.

    Raises:
        ResumeError: there is no checkpoint, it is damaged, or it is another run's.
    """
    if not path.exists():
        raise ResumeError(f"{path}: there is no interrupted run to resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise ResumeError(f"{path}: cannot be read ({error})") from None
    if (saved := metadata.get("run", "")) != run:
        raise ResumeError(
            refusal(path, "run", differences(decode_identity(saved), decode_identity(run)))
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(parts["weights"][name])
            if name in parts["exp_avg"]:
                optimizer.state[tensor] = {
                    "step": torch.tensor(float(metadata["steps"]), device=tensor.device),
                    "exp_avg": parts["exp_avg"][name].to(tensor.device),
                    "exp_avg_sq": parts["exp_avg_sq"][name].to(tensor.device),
                }
    content = json.loads(metadata["state"])
    content["history"] = [EpochReport(**epoch) for epoch in content["history"]]
    content["best_score"] = tuple(content["best_score"])
    return Checkpoint(**content), parts["best"]
