"""The frozen transformer, and the forward pass that takes any mixture of adapters without padding.

Data flow of `Backbone.forward`:

    rows -> PackedBatch -> embeddings [T, n] -> layer 0 .. m-1 -> generate prompts, expand -> layer
        m .. L-2 -> last layer, read positions only -> answers [rows, n]

Knows no labels: what the answers mean is the head's business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.backbone.attention import PACKED_ATTENTION
from adapters.backbone.families import Family, family_of
from adapters.backbone.tokenizer import TextEncoder
from adapters.errors import IncompatibleAdapter
from adapters.format.spec import AdapterSpec, BackboneIdentity, GeneratorInput
from adapters.layers.bert import BertLayer
from adapters.packed.layout import Layout, row_means
from adapters.packed.packing import Generation, Insertion, PackedBatch, Row
from adapters.packed.prompt import GeneratorWeights, generate


@dataclass(frozen=True, slots=True)
class Trunk:
    """States of a batch's tokens below every insertion, in its order: no adapter has touched them.

    layer: how many layers have been run. hidden: [T, n], what enters that layer. embeddings: [T,
    n], or None where no row of the batch generates its prompt from them.
    """

    layer: int
    hidden: Tensor
    embeddings: Tensor | None


@dataclass(frozen=True, slots=True)
class Answers:
    """States [rows, n] and the generators' token weights, in the batch's order.

    generator_seconds: spent on making prompts. On CUDA that is the time to launch their kernels,
    not to run them.
    """

    states: Tensor
    token_weights: tuple[tuple[Generation, Tensor], ...]
    generator_seconds: float


class Extents(Protocol):
    """The rows of a sequence, as attention asks for them: `adapters.packed.packing.Layout` or the like."""

    @property
    def cumulative(self) -> Tensor: ...
    @property
    def longest(self) -> int: ...
    def by_run(self, states: Tensor) -> list[Tensor]: ...


class Host(Protocol):
    """What decides whether an adapter fits: a backbone, or what somebody elsewhere knows of one."""

    @property
    def identity(self) -> BackboneIdentity: ...
    @property
    def encoder(self) -> TextEncoder: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...


class Backbone:
    """A frozen Hugging Face model run as a packed batch with prompt slots.

    Args:
        model: a base model (no task head) of a supported family. Its attention is set to the packed
            one, for this object's own configuration only.
        encoder: its tokenizer.
        identity: name, revision and fingerprint, compared with the adapters'.

    Raises:
        UnsupportedBackbone: the family cannot take this road.
    """

    def __init__(self, model: nn.Module, encoder: TextEncoder, identity: BackboneIdentity) -> None:
        config: Any = model.config
        self.family: Family = family_of(config)
        self.encoder = encoder
        self.identity = identity
        self.hidden_size = int(config.hidden_size)
        self.max_tokens = self.family.max_tokens(config)
        config._attn_implementation = PACKED_ATTENTION
        self._model = model.eval().requires_grad_(False)
        self._layers = self.family.layers(model)
        self.layers = len(self._layers)

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._model.parameters()).dtype

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Backbone":
        """Move or cast the weights, in place."""
        self._model.to(device=device, dtype=dtype)
        return self

    def changed(self) -> nn.Module:
        """The Hugging Face model itself, for who replaces its modules or trains its weights.

        From then on no faster code stands in for its layers.
        """
        for layer in self._layers:
            if isinstance(layer, BertLayer):
                layer.will_change()
        return self._model

    @property
    def model_type(self) -> str:
        """Its family, as `transformers` names it."""
        config: Any = self._model.config
        return str(config.model_type)

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The table of token vectors, before positions and norms."""
        model: Any = self._model
        table: nn.Embedding = model.get_input_embeddings()
        return table

    def state_dict(self) -> dict[str, Tensor]:
        """The model's own weights."""
        return self._model.state_dict()

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Put back weights that `state_dict` gave."""
        self._model.load_state_dict(weights)

    def check(self, spec: AdapterSpec) -> None:
        """Refuse a spec that was not made for this backbone.

        Raises:
            IncompatibleAdapter: with every difference.
        """
        check_fits(spec, self)

    def pack(self, rows: Sequence[Row]) -> PackedBatch:
        """Index arrays for one forward pass, on this backbone's device."""
        return PackedBatch(rows, causal=self.family.causal, device=self.device)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, offsets: Tensor) -> Tensor:
        """What enters the first layer, [T, n]; `offsets` count from a row's start."""
        return self.family.embed(self._model, input_ids, token_type_ids, offsets)[0]

    def through(self, hidden: Tensor, first: int, behind: int, layout: Extents) -> Tensor:
        """Run layers `first` to `behind` - 1: [T, n] -> [T, n]."""
        states = hidden.unsqueeze(0)
        for index in range(first, behind):
            states = self._layers[index](states, attention_mask=None, layout=layout)
        return states[0]

    def read(self, hidden: Tensor, positions: Tensor, layout: Extents) -> Tensor:
        """Run the last layer for the positions that are read: [T, n] -> [positions, n]."""
        states = self.family.read(self._layers[-1], hidden.unsqueeze(0), positions, layout)
        return self.finish(states)

    def trunk(self, batch: PackedBatch, layer: int, *, above: Trunk | None = None) -> Trunk:
        """Run the layers below `layer`, at most the lowest insertion layer; from `above` on."""
        if above is None:
            embedded = self.embed(batch.input_ids, batch.token_type_ids, batch.offsets)
            above = Trunk(0, embedded, embedded)
        hidden = self.through(above.hidden, above.layer, layer, batch.layout)
        return Trunk(layer, hidden, above.embeddings)

    def finish(self, states: Tensor) -> Tensor:
        """What the family does behind its last layer (GPT-2's final norm): [T, n] -> [T, n]."""
        return self.family.finish(self._model, states)

    def forward(
        self,
        batch: PackedBatch,
        generators: Mapping[int, GeneratorWeights],
        *,
        trunk: Trunk | None = None,
    ) -> Answers:
        """Answer states of every row.

        Args:
            generators: by the batch's adapter index.
            trunk: the state below the lowest insertion layer, when the caller has kept it.

        Returns:
            states [rows, n] in the batch's order: `batch.order` leads back to the caller's.
        """
        lowest = batch.insertions[0].layer
        trunk = self.trunk(batch, lowest, above=trunk)
        insertions = {insertion.layer: insertion for insertion in batch.insertions}
        hidden, layout = trunk.hidden, batch.layout
        weights: list[tuple[Generation, Tensor]] = []
        generator_seconds = 0.0
        for index in range(lowest, self.layers):
            if (insertion := insertions.get(index)) is not None:
                started = perf_counter()
                prompts, made = _prompts(insertion, hidden, trunk.embeddings, generators)
                generator_seconds += perf_counter() - started
                hidden = torch.cat([hidden, *prompts]).index_select(0, insertion.expand)
                layout = insertion.layout
                weights += made
            if index < self.layers - 1:
                hidden = self.through(hidden, index, index + 1, layout)
        states = mean_of_rows(self.read(hidden, batch.reads, layout), batch.read_layout)
        return Answers(states, tuple(weights), generator_seconds)


def check_fits(spec: AdapterSpec, host: Host) -> None:
    """Refuse a spec that was not made for this host.

    Raises:
        IncompatibleAdapter: with every difference.
    """
    faults = []
    if spec.backbone.fingerprint != host.identity.fingerprint:
        faults.append(
            f"backbone: trained on {spec.backbone.name!r} ({spec.backbone.fingerprint[:12]}), "
            f"loaded is {host.identity.name!r} ({host.identity.fingerprint[:12]})"
        )
    if spec.tokenizer_sha256 != host.encoder.sha256:
        faults.append(
            f"tokenizer: {spec.tokenizer_sha256[:12]}, loaded is {host.encoder.sha256[:12]}"
        )
    if spec.hidden_size != host.hidden_size:
        faults.append(f"hidden_size: {spec.hidden_size}, the backbone's is {host.hidden_size}")
    if spec.insertion_layer >= host.layers:
        faults.append(
            f"insertion_layer: {spec.insertion_layer}, the backbone has layers 0..{host.layers - 1}"
        )
    if spec.max_length > host.max_tokens:
        faults.append(f"max_length: {spec.max_length}, the backbone takes {host.max_tokens} tokens")
    if faults:
        raise IncompatibleAdapter(faults)


def _prompts(
    insertion: Insertion,
    hidden: Tensor,
    embeddings: Tensor | None,
    generators: Mapping[int, GeneratorWeights],
) -> tuple[list[Tensor], list[tuple[Generation, Tensor]]]:
    prompts, weights = [], []
    for generation in insertion.generations:
        source = embeddings if generation.source is GeneratorInput.EMBEDDINGS else hidden
        assert source is not None, "a trunk that was kept for prompts from embeddings holds them"
        prompt, w = generate(source, generation, generators)
        prompts.append(prompt)
        weights.append((generation, w))
    return prompts, weights


def mean_of_rows(states: Tensor, layout: Layout) -> Tensor:
    """What was read, one vector a row: [positions read, n] -> [rows, n].

    One position a row stays as it is.
    """
    return states if layout.longest == 1 else row_means(states, layout).to(states.dtype)
