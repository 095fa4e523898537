"""One trained adapter, prepared for a backbone, and the classification of packed batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.backbone.model import Backbone, ForwardOutput, check_fits
from adapters.errors import InvalidAdapter
from adapters.format.files import Adapter, all_finite
from adapters.format.spec import AdapterSpec, AttentionPrompt
from adapters.packed.head import HeadWeights, logits, scores
from adapters.packed.packing import PackedBatch, Row, RowShape
from adapters.packed.prompt import GeneratorWeights
from adapters.tokenizer import Encoding

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter on a backbone's device, its generator folded for serving."""

    spec: AdapterSpec
    generator: GeneratorWeights
    head: HeadWeights
    shape: RowShape

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        values = (
            getattr(weights, name)
            for weights in (self.generator, self.head)
            for name in weights.__slots__
        )
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer for one text.

    scores: float32 [labels], in the order of `spec.labels`. token_weights: float32 [tokens], the
    share of each token in the prompt.
    """

    scores: Float32
    token_weights: Float32


def prepare(adapter: Adapter, backbone: Backbone) -> PreparedAdapter:
    """Fold an adapter (`GeneratorWeights.folded`) and move it to the backbone's device and type.

    Raises:
        IncompatibleAdapter: it was made for another backbone.
        InvalidAdapter: its weights are finite, but their products or casts are not.
    """
    check_fits(adapter.spec, backbone)
    tensors = {
        name: tensor.to(backbone.device, torch.float32) for name, tensor in adapter.tensors.items()
    }
    assert isinstance(adapter.spec.prompt, AttentionPrompt)
    generator = GeneratorWeights.of(adapter.spec.prompt, tensors).folded().cast(backbone.dtype)
    # All other weights are neither multiplied nor cast: they are as finite as in the file.
    if not all_finite(generator.down, *([] if generator.query is None else [generator.query])):
        raise InvalidAdapter([f"generator: not finite once folded and cast to {backbone.dtype}"])
    return PreparedAdapter(
        adapter.spec, generator, HeadWeights.of(tensors), RowShape.of(adapter.spec)
    )


def rows_of(
    adapters: Sequence[PreparedAdapter], inputs: Sequence[tuple[int, Encoding]]
) -> list[Row]:
    """Rows of a batch, from (index into `adapters`, encoding)."""
    return [Row(encoding, adapters[index].shape, index) for index, encoding in inputs]


def classify(
    backbone: Backbone, batch: PackedBatch, adapters: Sequence[PreparedAdapter]
) -> list[Classification]:
    """Run one packed batch; the answers are in the order of the rows that it was packed from."""
    return classify_timed(backbone, batch, adapters)[0]


@torch.inference_mode()
def classify_timed(
    backbone: Backbone, batch: PackedBatch, adapters: Sequence[PreparedAdapter]
) -> tuple[list[Classification], float]:
    """As `classify`, with the seconds spent on prompts (`ForwardOutput.generator_seconds`)."""
    generators = {index: adapter.generator for index, adapter in enumerate(adapters)}
    output = backbone.forward(batch, generators)
    row_scores = _scores(output.states, batch, adapters)
    token_weights = _token_weights(output, batch)
    answers: list[Classification | None] = [None] * len(batch.rows)
    for row, original in enumerate(batch.order.tolist()):
        answers[original] = Classification(row_scores[row], token_weights[row])
    return [answer for answer in answers if answer is not None], output.generator_seconds


def _scores(
    states: Tensor, batch: PackedBatch, adapters: Sequence[PreparedAdapter]
) -> list[Float32]:
    """Every row's scores: the rows of one adapter go through its head together."""
    owners = np.array([row.adapter for row in batch.rows])
    row_scores = [np.empty(0, np.float32)] * len(owners)
    for index in np.unique(owners):
        adapter = adapters[index]
        rows = np.flatnonzero(owners == index)
        adapter_scores = scores(
            logits(states[torch.from_numpy(rows).to(states.device)], adapter.head),
            adapter.spec.activation,
            adapter.spec.calibration.temperature,
        )
        for row, values in zip(rows, adapter_scores.cpu().numpy(), strict=True):
            row_scores[row] = values
    return row_scores


def _token_weights(output: ForwardOutput, batch: PackedBatch) -> list[Float32]:
    row_weights = [np.empty(0, np.float32)] * len(batch.rows)
    for generation, weights in output.token_weights:
        pieces = np.split(weights.cpu().numpy(), generation.layout.starts[1:])
        for row, piece in zip(generation.rows, pieces, strict=True):
            row_weights[row] = piece
    return row_weights
