"""What the device could do at best, measured in the same run; what a forward pass asks of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from adapters.backbone.model import Backbone
from adapters.backbone.tokenizer import Encoding

_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
_EMBEDDINGS = ("embeddings.", "wte.", "wpe.")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """matmul: TFLOP/s of the model's own weight shapes on `tokens` rows, by shape.

    copy: GB/s of a copy within the device's memory, bytes read and written.
    """

    tokens: int
    matmul: dict[str, float]
    copy: float

    def best(self, other: "Ceilings") -> "Ceilings":
        """The better of two measurements, shape by shape: a ceiling is what was reached once."""
        matmul = {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()}
        return Ceilings(self.tokens, matmul, max(self.copy, other.copy))

    @property
    def flops(self) -> float:
        """FLOP/s of the fastest shape."""
        return max(self.matmul.values()) * 1e12


def synchronize(device: torch.device) -> None:
    """Wait for what was launched; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, *, seconds: float) -> float:
    """Mean seconds of one call over about so many seconds, after a warm-up."""
    for _ in range(2):
        work()
    synchronize(device)
    calls, started = 0, perf_counter()
    while calls == 0 or perf_counter() - started < seconds:
        for _ in range(4):
            work()
        synchronize(device)
        calls += 4
    return (perf_counter() - started) / calls


@torch.inference_mode()
def measure_ceilings(backbone: Backbone, *, tokens: int, seconds: float) -> Ceilings:
    """Ceilings of the backbone's device in its dtype."""
    device = backbone.device
    matmul = {}
    for rows, columns in sorted(set(_layer_shapes(backbone))):
        left = torch.randn(tokens, columns, device=device).to(backbone.dtype)
        right = torch.randn(rows, columns, device=device).to(backbone.dtype)
        took = seconds_of(partial(torch.matmul, left, right.T), device, seconds=seconds)
        matmul[f"{tokens}x{columns}x{rows}"] = 2 * tokens * rows * columns / took / 1e12
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = seconds_of(lambda: target.copy_(source), device, seconds=seconds)
    return Ceilings(tokens, matmul, 2 * source.nbytes / took / 1e9)


def flops_of(backbone: Backbone, encodings: Sequence[Encoding]) -> float:
    """Floating-point operations that these texts need: products with weights, and attention.

    Useful ones only: no padding, no prompt, nothing of an adapter.
    """
    weights = sum(rows * columns for rows, columns in _layer_shapes(backbone))
    per_pair = 4 * backbone.layers * backbone.hidden_size
    return float(sum(2 * weights * len(item) + per_pair * len(item) ** 2 for item in encodings))


def _layer_shapes(backbone: Backbone) -> list[tuple[int, int]]:
    """Of every weight matrix in the layers, [outputs, inputs]."""
    return [
        (tensor.shape[0], tensor.shape[1])
        for name, tensor in backbone.state_dict().items()
        if tensor.ndim == 2 and not name.startswith(_EMBEDDINGS)
    ]
