"""The state of an interrupted run, a file beside its output. Safetensors: nothing is unpickled.

Order, dropout and learning rate are functions of seed and step, so weights, moments and counters
are all there is to keep, and a resumed run on a CPU ends with the bits of an uninterrupted one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adapters.format.durable import write_atomically
from train.errors import ResumeError
from train.loop.progress import EpochReport

_PARTS = ("weights", "best", "exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class RunState:
    """Where a run stands. epoch counts finished epochs; step: of the epoch under way. running: of
    that epoch."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_score: tuple[float, float] = (-1.0, 0.0)
    seconds: float = 0.0
    running: dict[str, float] = field(
        default_factory=lambda: {"loss": 0.0, "hits": 0.0, "texts": 0.0, "seconds": 0.0}
    )
    history: list[EpochReport] = field(default_factory=list)


def state_path(output: Path) -> Path:
    """Where the state of the run that writes `output` is kept."""
    return output.with_name(output.name + ".state")


def save_state(
    path: Path,
    state: RunState,
    *,
    run: str,
    weights: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything that `load_state` needs, atomically.

    Args:
        run: identifies data, settings and backbone; another run's state is refused.
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
    metadata = {"run": run, "state": json.dumps(asdict(state)), "steps": str(steps)}
    write_atomically(
        path,
        save({key: item.cpu().contiguous() for key, item in tensors.items()}, metadata=metadata),
    )


def load_state(
    path: Path, *, run: str, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[RunState, dict[str, Tensor]]:
    """Put weights and moments back; returns the counters and the best weights so far.

    Raises:
        ResumeError: no state there, a damaged one, or one of another run.
    """
    if not path.exists():
        raise ResumeError(f"{path}: there is no interrupted run to resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise ResumeError(f"{path}: cannot be read ({error})") from None
    if metadata.get("run") != run:
        raise ResumeError(
            f"{path}: belongs to a run with other data, settings or backbone; "
            "remove it to start over"
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
    return _run_state(json.loads(metadata["state"])), parts["best"]


def _run_state(content: dict[str, Any]) -> RunState:
    content["history"] = [EpochReport(**epoch) for epoch in content["history"]]
    content["best_score"] = tuple(content["best_score"])
    return RunState(**content)
