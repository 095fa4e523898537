"""One trained adapter: as a file holds it, and prepared to run beside others on a backbone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.backbone.model import Answers, Backbone
from adapters.backbone.tokenizer import Encoding
from adapters.errors import InvalidAdapter
from adapters.format.files import Adapter, all_finite
from adapters.format.spec import AdapterSpec, FinalActivation, GeneratorInput
from adapters.packed.head import HeadWeights, logits, scores
from adapters.packed.packing import PackedBatch, Row
from adapters.packed.prompt import GeneratorWeights


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter on a backbone's device, its generator folded for serving."""

    spec: AdapterSpec
    generator: GeneratorWeights
    head: HeadWeights

    @property
    def nbytes(self) -> int:
        """Device memory that its tensors take."""
        parts = (*_tensors(self.generator), *_tensors(self.head))
        return sum(tensor.nbytes for tensor in parts)


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer for one text.

    scores: float32 [labels], as `spec.labels` orders them. token_weights: float32 [tokens], what
    share of the prompt came from each token.
    """

    scores: npt.NDArray[np.float32]
    token_weights: npt.NDArray[np.float32]


def prepare(adapter: Adapter, backbone: Backbone) -> PreparedAdapter:
    """Move an adapter to the backbone's device, folded (`GeneratorWeights.folded`), in its type.

    Raises:
        IncompatibleAdapter: it was made for another backbone.
        InvalidAdapter: its weights are finite, but their products or casts are not.
    """
    backbone.check(adapter.spec)
    tensors = {
        name: tensor.to(backbone.device, torch.float32) for name, tensor in adapter.tensors.items()
    }
    generator = GeneratorWeights.of(adapter.spec, tensors).folded().cast(backbone.dtype)
    prepared = PreparedAdapter(adapter.spec, generator, HeadWeights.of(tensors))
    # What is neither a product nor cast is as finite as it was in its file.
    if not all_finite(generator.down, *([] if generator.query is None else [generator.query])):
        raise InvalidAdapter([f"generator: not finite once folded and cast to {backbone.dtype}"])
    return prepared


def random_adapter(backbone: Backbone, *, seed: int = 0) -> Adapter:
    """A seeded adapter in the shape that `fit` gives by default: to warm up, probe, measure."""
    n = backbone.hidden_size
    spec = AdapterSpec(
        backbone=backbone.identity,
        tokenizer_sha256=backbone.encoder.sha256,
        hidden_size=n,
        prompt_length=10,
        bottleneck=34,
        attention_size=n,
        insertion_layer=backbone.layers // 2,
        generator_input=GeneratorInput.HIDDEN,
        final_activation=FinalActivation.NONE,
        labels=("no", "yes"),
        max_length=min(256, backbone.max_tokens),
    )
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=random) / math.sqrt(shape[0])
        for name, shape in spec.shapes().items()
    }
    return Adapter(spec, tensors)


def rows_of(
    adapters: Sequence[PreparedAdapter], inputs: Sequence[tuple[int, Encoding]]
) -> list[Row]:
    """Rows of a batch, from (index into `adapters`, encoding)."""
    return [Row(encoding, adapters[index].spec, index) for index, encoding in inputs]


@torch.inference_mode()
def classify(
    backbone: Backbone, batch: PackedBatch, adapters: Sequence[PreparedAdapter]
) -> list[Classification]:
    """Run one packed batch; answers come in the order of the rows that it was packed from."""
    return classifications(answer(backbone, batch, adapters), batch, adapters)


@torch.inference_mode()
def answer(backbone: Backbone, batch: PackedBatch, adapters: Sequence[PreparedAdapter]) -> Answers:
    """The first half of `classify`: the forward pass."""
    return backbone.forward(
        batch, {index: adapter.generator for index, adapter in enumerate(adapters)}
    )


@torch.inference_mode()
def classifications(
    answers: Answers, batch: PackedBatch, adapters: Sequence[PreparedAdapter]
) -> list[Classification]:
    """The second half of `classify`: heads, scores, back to the host and the caller's order."""
    row_scores = _scores(answers.states, batch, adapters)
    weights = _token_weights(answers, batch)
    result: list[Classification | None] = [None] * len(batch.rows)
    for position, original in enumerate(batch.order.tolist()):
        result[original] = Classification(row_scores[position], weights[position])
    return [item for item in result if item is not None]


def _scores(
    states: Tensor, batch: PackedBatch, adapters: Sequence[PreparedAdapter]
) -> list[npt.NDArray[np.float32]]:
    owners = np.array([row.adapter for row in batch.rows])
    found: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(owners)
    for index in np.unique(owners):
        adapter = adapters[index]
        mine = np.flatnonzero(owners == index)
        chosen = states[torch.from_numpy(mine).to(states.device)]
        made = scores(
            logits(chosen, adapter.head),
            adapter.spec.activation,
            adapter.spec.calibration.temperature,
        )
        for position, values in zip(mine, made.cpu().numpy(), strict=True):
            found[position] = values
    return found


def _token_weights(answers: Answers, batch: PackedBatch) -> list[npt.NDArray[np.float32]]:
    found: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(batch.rows)
    for generation, weights in answers.token_weights:
        pieces = np.split(weights.cpu().numpy(), generation.layout.starts[1:])
        for position, piece in zip(generation.rows, pieces, strict=True):
            found[position] = piece
    return found


def _tensors(weights: GeneratorWeights | HeadWeights) -> list[Tensor]:
    values = (getattr(weights, name) for name in weights.__slots__)
    return [value for value in values if isinstance(value, Tensor)]
