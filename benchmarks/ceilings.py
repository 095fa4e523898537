"""Upper bounds, measured in the same run: the device's ceilings, and a packed forward pass.

The pass without any adapter is the only code of the benchmarks that reaches below the engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from time import perf_counter

import torch
from torch import Tensor

from adapters.backbone.model import Backbone, random_adapter
from adapters.packed.packing import PackedBatch, Row, RowShape
from adapters.tokenizer import Encoding

_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
_EMBEDDINGS = ("embeddings.", "wte.", "wpe.")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reaches at best.

    matmul: TFLOP/s of the model's own weight shapes on `tokens` rows, by shape. copy: GB/s of a
    copy within the device's memory, bytes read and written.
    """

    tokens: int
    matmul: dict[str, float]
    copy: float

    def best(self, other: "Ceilings") -> "Ceilings":
        """The better of two measurements, shape by shape: what was reached once can be reached."""
        matmul = {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()}
        return Ceilings(self.tokens, matmul, max(self.copy, other.copy))

    @property
    def flops(self) -> float:
        """FLOP/s of the fastest shape."""
        return max(self.matmul.values()) * 1e12


def synchronize(device: torch.device) -> None:
    """Wait until the device has run everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure_ceilings(backbone: Backbone, *, tokens: int, seconds: float) -> Ceilings:
    """The ceilings of the backbone's device, in its dtype."""
    device = backbone.device
    matmul = {}
    for rows, columns in sorted(set(_layer_shapes(backbone))):
        left = torch.randn(tokens, columns, device=device).to(backbone.dtype)
        right = torch.randn(rows, columns, device=device).to(backbone.dtype)
        took = _seconds_of(partial(torch.matmul, left, right.T), device, seconds=seconds)
        matmul[f"{tokens}x{columns}x{rows}"] = 2 * tokens * rows * columns / took / 1e12
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = _seconds_of(lambda: target.copy_(source), device, seconds=seconds)
    return Ceilings(tokens, matmul, 2 * source.nbytes / took / 1e9)


def flops_of(backbone: Backbone, encodings: Sequence[Encoding]) -> float:
    """Floating-point operations that these texts need: products with weights, and attention.

    Only the useful ones: no padding, no prompt, nothing of an adapter.
    """
    weights = sum(rows * columns for rows, columns in _layer_shapes(backbone))
    per_pair = 4 * backbone.layers * backbone.hidden_size
    return float(sum(2 * weights * len(text) + per_pair * len(text) ** 2 for text in encodings))


@torch.inference_mode()
def forward_without_adapters(backbone: Backbone, batch: PackedBatch) -> Tensor:
    """States at every row's answer position, [rows, n]; the last layer is run only for those."""
    trunk = backbone.trunk(batch, backbone.layers - 1)
    positions = torch.from_numpy(batch.layout.starts).to(backbone.device)
    states = backbone.family.read(
        backbone._layers[-1], trunk.hidden.unsqueeze(0), positions, batch.layout
    )
    return backbone.final_norm(states)


class PackedForward:
    """Batches of these texts, packed beforehand up to a token budget: only the device is timed."""

    def __init__(
        self, backbone: Backbone, encodings: Sequence[Encoding], *, max_tokens: int
    ) -> None:
        self._backbone = backbone
        spec = random_adapter(backbone).spec
        self._batches = [
            backbone.pack([Row(encoding, RowShape.of(spec), 0) for encoding in texts])
            for texts in _in_batches(encodings, max_tokens)
        ]

    async def texts_per_second(self, seconds: float) -> float:
        """Run whole batches in turns for about so long. Never waits, so nothing else runs."""
        texts, started = 0, perf_counter()
        for batch in cycle(self._batches):
            forward_without_adapters(self._backbone, batch)
            texts += len(batch.rows)
            if perf_counter() - started >= seconds:
                break
        # Only now: while one batch runs, the next is launched.
        synchronize(self._backbone.device)
        return texts / (perf_counter() - started)


def _in_batches(encodings: Sequence[Encoding], max_tokens: int) -> list[list[Encoding]]:
    """In order, each batch as large as the budget allows."""
    batches: list[list[Encoding]] = []
    left = 0
    for encoding in encodings:
        if len(encoding) > left or not batches:
            batches.append([])
            left = max_tokens
        batches[-1].append(encoding)
        left -= len(encoding)
    # A last batch that is not full would take longer per text.
    return batches[:-1] if len(batches) > 1 else batches


def _seconds_of(work: Callable[[], object], device: torch.device, *, seconds: float) -> float:
    """Mean seconds of one call, over about so many seconds, after a warm-up."""
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


def _layer_shapes(backbone: Backbone) -> list[tuple[int, int]]:
    """[outputs, inputs] of every weight matrix in the layers."""
    return [
        (tensor.shape[0], tensor.shape[1])
        for name, tensor in backbone.state_dict().items()
        if tensor.ndim == 2 and not name.startswith(_EMBEDDINGS)
    ]
