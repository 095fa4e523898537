"""One trained adapter, prepared for a backbone, and the classification of packed batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.backbone.model import Backbone, ForwardOutput, Trunk, check_fits
from adapters.errors import InvalidAdapter
from adapters.format.files import Adapter, all_finite
from adapters.format.spec import AdapterSpec
from adapters.packed.head import HeadWeights, logits, scores
from adapters.packed.packing import PackedBatch, Row, RowShape
from adapters.packed.prompt import GeneratorWeights
from adapters.packed.sharing import shared_rows
from adapters.packed.tuning import MixedTuning, TuningWeights, tuning_weights
from adapters.tokenizer import Encoding

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter on a backbone's device, its generator folded for serving.

    head: None: the answer is what a head would read (`adapters.embedding`). nbytes: memory of its
    tensors. It is asked for several times at every load.
    """

    spec: AdapterSpec
    generator: GeneratorWeights | None
    tuning: TuningWeights | None
    head: HeadWeights | None
    shape: RowShape
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        parts = (self.generator, self.tuning, self.head)
        tensors = (tensor for part in parts if part is not None for tensor in part.tensors)
        object.__setattr__(self, "nbytes", sum(tensor.nbytes for tensor in tensors))


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer for one text.

    scores: float32 [labels], in the order of `spec.labels`; without a head, [n]. token_weights:
    float32 [tokens], the share of each token in the prompt; empty if no prompt is made from the
    text. shared_layers: how many layers were run for another row of the same text
    (`adapters.packed.sharing`).
    """

    scores: Float32
    token_weights: Float32
    shared_layers: int = 0


def prepare(adapter: Adapter, backbone: Backbone) -> PreparedAdapter:
    """Fold an adapter (`GeneratorWeights.folded`) and move it to the backbone's device and type.

    Raises:
        IncompatibleAdapter: it was made for another backbone.
        InvalidAdapter: its weights are finite, but their products or casts are not.
    """
    spec = adapter.spec
    check_fits(spec, backbone)
    tensors = {
        name: tensor.to(backbone.device, torch.float32) for name, tensor in adapter.tensors.items()
    }
    generator = tuning = None
    faults = []
    if spec.prompt is not None:
        generator = GeneratorWeights.of(spec.prompt, tensors, positions=spec.max_length)
        generator = generator.folded().cast(backbone.dtype)
        # All its other weights are neither multiplied nor cast: they are as finite as in the file.
        made = (generator.down, generator.query, generator.table)
        made_tensors = [tensor for tensor in made if tensor is not None]
        if made_tensors and not all_finite(*made_tensors):
            faults.append(f"generator: not finite once folded and cast to {backbone.dtype}")
    if spec.tuning is not None:
        tuning = tuning_weights(spec.tuning, tensors).cast(backbone.dtype)
        if not all_finite(*tuning.tensors):
            faults.append(f"tuning: not finite once scaled and cast to {backbone.dtype}")
    if faults:
        raise InvalidAdapter(faults)
    head = HeadWeights.of(tensors, spec.head.hidden)
    return PreparedAdapter(spec, generator, tuning, head, RowShape.of(spec))


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
    backbone: Backbone,
    batch: PackedBatch,
    adapters: Sequence[PreparedAdapter],
    *,
    sharing: bool = True,
) -> tuple[list[Classification], float]:
    """As `classify`, with the seconds spent on prompts (`ForwardOutput.generator_seconds`).

    Args:
        sharing: whether rows with the same text share their lower layers.
    """
    generators = {
        index: adapter.generator
        for index, adapter in enumerate(adapters)
        if adapter.generator is not None
    }
    tunings = {
        index: adapter.tuning
        for index, adapter in enumerate(adapters)
        if adapter.tuning is not None
    }
    tuning = MixedTuning(batch, tunings) if tunings else None
    trunk, shared_layers = None, [0] * len(batch.rows)
    if sharing:
        trunk, shared_layers = _shared_trunk(backbone, batch, generators, tunings)
    output = backbone.forward(batch, generators, trunk=trunk, tuning=tuning)
    row_scores = _scores(output.states, batch, adapters)
    token_weights = _token_weights(output, batch)
    answers: list[Classification | None] = [None] * len(batch.rows)
    for row, original in enumerate(batch.order.tolist()):
        answers[original] = Classification(row_scores[row], token_weights[row], shared_layers[row])
    return [answer for answer in answers if answer is not None], output.generator_seconds


def _shared_trunk(
    backbone: Backbone,
    batch: PackedBatch,
    generators: Mapping[int, GeneratorWeights],
    tunings: Mapping[int, TuningWeights],
) -> tuple[Trunk | None, list[int]]:
    """The states below the lowest insertion layer, each text's computed once; and for each row how
    many layers it has from another one. No states if no texts are equal."""
    nothing = None, [0] * len(batch.rows)
    layers = backbone.trunk_layers(batch)
    if layers == 0:
        return nothing
    apart = {index for index, weights in generators.items() if weights.table is not None}
    apart |= {index for index, weights in tunings.items() if min(weights.layers) < layers}
    shared = shared_rows(batch, apart)
    if shared is None:
        return nothing
    trunk = backbone.trunk(
        shared.batch,
        layers,
        tuning=MixedTuning(shared.batch, tunings) if tunings else None,
        words=backbone.words(shared.batch, generators),
    )
    copied = [layers if copy else 0 for copy in shared.copies]
    return trunk.expanded(shared.expand), copied


def _scores(
    states: Tensor, batch: PackedBatch, adapters: Sequence[PreparedAdapter]
) -> list[Float32]:
    """Every row's scores: the rows of one adapter go through its head together."""
    owners = np.array([row.adapter for row in batch.rows])
    row_scores = [np.empty(0, np.float32)] * len(owners)
    for index in np.unique(owners):
        adapter = adapters[index]
        rows = np.flatnonzero(owners == index)
        read = states[torch.from_numpy(rows).to(states.device)]
        adapter_scores = read.float()
        if adapter.head is not None:
            adapter_scores = scores(
                logits(read, adapter.head),
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
            # Of the first token alone.
            if len(piece) < (tokens := len(batch.rows[row].encoding)):
                row_weights[row] = np.pad(piece, (0, tokens - len(piece)))
    return row_weights
