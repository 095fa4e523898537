"""The frozen transformer, and a forward pass over any mixture of adapters without padding.

Data flow of `Backbone.forward`:

    rows -> PackedBatch -> embeddings [T, n] -> layers 0 .. m-1 -> generate prompts, expand ->
        layers m .. L-2 -> last layer, only for positions that are read -> states [rows, n]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from adapters.backbone.families import BERT_FAMILIES, Family, Tokens, family_of
from adapters.errors import IncompatibleAdapter, UnusableBackbone
from adapters.format.files import Adapter
from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    BackboneIdentity,
    FinalActivation,
    GeneratorInput,
    Prompt,
    StaticPrompt,
)
from adapters.layers.attention import PACKED_ATTENTION
from adapters.layers.bert import BertLayer
from adapters.layers.narrow import NARROW_ALIGNMENT, Handover
from adapters.layers.tuning import BackboneTuning
from adapters.packed.layout import Extents, Put, pool_rows
from adapters.packed.packing import Generation, Insertion, PackedBatch, PromptSource, Row
from adapters.packed.prompt import GeneratorWeights, add_tables, generate
from adapters.tokenizer import TextEncoder


@dataclass(frozen=True, slots=True)
class Trunk:
    """States of a batch's tokens below every insertion layer, the same for untuned adapters.

    layer: number of layers that have been run. hidden: [T, n], the input of the next one.
    embeddings: [T, n], or None if no row of the batch makes its prompt from them.
    """

    layer: int
    hidden: Tensor
    embeddings: Tensor | None

    def expanded(self, positions: Tensor) -> "Trunk":
        """The states of these positions, int64 [T'], some of them more than once."""
        embeddings = self.embeddings
        if embeddings is not None:
            embeddings = embeddings.index_select(0, positions)
        return Trunk(self.layer, self.hidden.index_select(0, positions), embeddings)


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """States [rows, n] and the generators' token weights, in the batch's order.

    generator_seconds: time spent on prompts. On CUDA it is the time to launch their kernels, not to
    run them.
    """

    states: Tensor
    token_weights: tuple[tuple[Generation, Tensor], ...]
    generator_seconds: float


class Host(Protocol):
    """What decides whether an adapter fits: a backbone, or the description of one."""

    @property
    def identity(self) -> BackboneIdentity: ...
    @property
    def encoder(self) -> TextEncoder: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def embedding_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...


class Backbone:
    """A frozen Hugging Face model that runs packed batches with soft prompts.

    Args:
        model: a base model (no task head) of a supported family. Its attention is set to
            `adapters.layers.attention`, in this object's configuration only.
        encoder: its tokenizer.
        identity: name, revision and fingerprint, which adapters are compared with.

    Raises:
        UnsupportedBackbone: this family cannot run packed batches.
    """

    def __init__(self, model: nn.Module, encoder: TextEncoder, identity: BackboneIdentity) -> None:
        config: Any = model.config
        self.family: Family = family_of(config)
        self.encoder = encoder
        self.identity = identity
        self.hidden_size = int(config.hidden_size)
        self.intermediate_size = self.family.intermediate_size(config)
        self.max_tokens = self.family.max_tokens(config)
        config._attn_implementation = PACKED_ATTENTION
        self._model = model.eval().requires_grad_(False)
        self._layers = self.family.layers(model)
        self.layers = len(self._layers)
        self._narrow: Literal["int8", "float8"] | None = None

    @property
    def embedding_size(self) -> int:
        """Width of the word embeddings; ELECTRA's are narrower than its states."""
        return self.word_embeddings.embedding_dim

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._model.parameters()).dtype

    @property
    def computes(self) -> str:
        """The type of its products: that of the weights, `int8` or `float8`."""
        return self._narrow or str(self.dtype).removeprefix("torch.")

    def use_int8(self, used: bool = True) -> "Backbone":
        """Compute the products of all layers in int8 (`adapters.layers.int8`), or no longer.

        The weights stay in float32, on a CPU. Where gradients are needed, they are used.

        Raises:
            UnusableBackbone: int8 does not run this family's layers.
        """
        for layer in self._bert_layers("int8"):
            layer.use_int8(used)
        self._narrow = "int8" if used else None
        return self

    def use_float8(self, used: bool = True) -> "Backbone":
        """Compute the products of all layers in float8 (`adapters.layers.float8`), or no longer.

        The weights stay in bfloat16, on a CUDA device. Where gradients are needed, they are used.

        Raises:
            UnusableBackbone: float8 does not run this family's layers, or layers of this width.
        """
        layers = self._bert_layers("float8")
        for name, width in (
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
        ):
            if width % NARROW_ALIGNMENT:
                raise UnusableBackbone(
                    f"dtype 'float8': needs widths that are multiples of {NARROW_ALIGNMENT}; "
                    f"{name} of the backbone {self.identity.name!r} is {width}"
                )
        handover = Handover() if used else None
        for layer in layers:
            layer.use_float8(handover)
        self._narrow = "float8" if used else None
        return self

    def check_float8(self) -> None:
        """
        Raises:
            RuntimeError, or any Exception: as of `adapters.layers.float8.Float8Layer.check`.
        """
        # Imported here: Triton comes only with PyTorch for CUDA, and not on every system.
        from adapters.layers.float8 import Float8Layer

        layer = self._bert_layers("float8")[0]
        with torch.cuda.device(self.device):
            Float8Layer(layer.layer, Handover()).check()

    def _bert_layers(self, dtype: str) -> list[BertLayer]:
        """
        Raises:
            UnusableBackbone: some layers are others.
        """
        layers = [layer for layer in self._layers if isinstance(layer, BertLayer)]
        if len(layers) < len(self._layers):
            raise UnusableBackbone(
                f"dtype {dtype!r}: runs layers of {', '.join(BERT_FAMILIES)}; the backbone "
                f"{self.identity.name!r} is of the family {self.model_type!r}"
            )
        return layers

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Backbone":
        """Move or cast the weights, in place."""
        self._model.to(device=device, dtype=dtype)
        return self

    def editable_model(self) -> nn.Module:
        """The Hugging Face model, for callers that replace its modules or train its weights.

        From now on its layers run as `transformers` has them, never by faster code.
        """
        for layer in self._layers:
            if isinstance(layer, BertLayer):
                layer.use_transformers()
        return self._model

    @property
    def model_type(self) -> str:
        """The family's name in `transformers`."""
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
        """Restore weights from `state_dict`."""
        self._model.load_state_dict(weights)

    def pack(self, rows: Sequence[Row], *, put: Put | None = None, room: int = 0) -> PackedBatch:
        """Index arrays for one forward pass, on this backbone's device.

        Args:
            put, room: as in `PackedBatch`.
        """
        return PackedBatch(rows, causal=self.family.causal, device=self.device, put=put, room=room)

    def embed(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        offsets: Tensor,
        *,
        shifts: Tensor | None = None,
        words: Tensor | None = None,
    ) -> Tensor:
        """The input of the first layer, [T, n]. The arguments are those of `families.Tokens`."""
        tokens = Tokens(input_ids, token_type_ids, offsets, shifts, words)
        return self.family.embed(self._model, tokens)[0]

    def run_layers(
        self,
        hidden: Tensor,
        first: int,
        end: int,
        layout: Extents,
        tuning: BackboneTuning | None = None,
    ) -> Tensor:
        """Run layers `first` to `end` - 1: [T, n] -> [T, n]."""
        for index in range(first, end):
            layer = self._layers[index]
            changes = None if tuning is None else tuning.at(index, layout)
            if changes is None:
                hidden = layer(hidden.unsqueeze(0), attention_mask=None, layout=layout)[0]
            else:
                hidden = self.family.forward_tuned(layer, hidden, layout, changes)
        return hidden

    def read(
        self,
        hidden: Tensor,
        positions: Tensor,
        layout: Extents,
        tuning: BackboneTuning | None = None,
    ) -> Tensor:
        """Run the last layer, only for some positions: [T, n] -> [positions, n]."""
        layer = self._layers[-1]
        changes = None if tuning is None else tuning.at(self.layers - 1, layout)
        if changes is None:
            states = self.family.read(layer, hidden.unsqueeze(0), positions, layout)
        else:
            states = self.family.read_tuned(layer, hidden, positions, layout, changes)
        return self.final_norm(states)

    def trunk(
        self,
        batch: PackedBatch,
        layer: int,
        *,
        start: Trunk | None = None,
        tuning: BackboneTuning | None = None,
        words: Tensor | None = None,
    ) -> Trunk:
        """Run the layers below `layer`, which is at most the lowest insertion layer.

        Args:
            start: the states after the layers that have already been run.
            tuning: the adapters' changes to the layers.
            words: [T, width], in place of the tokens' word embeddings.
        """
        if start is None:
            embedded = self.embed(
                batch.input_ids,
                batch.token_type_ids,
                batch.offsets,
                shifts=batch.shifts,
                words=words,
            )
            start = Trunk(0, embedded, embedded)
        hidden = self.run_layers(start.hidden, start.layer, layer, batch.layout, tuning)
        return Trunk(layer, hidden, start.embeddings)

    def final_norm(self, states: Tensor) -> Tensor:
        """The norm after the last layer, in families that have one (GPT-2): [T, n] -> [T, n]."""
        return self.family.final_norm(self._model, states)

    def forward(
        self,
        batch: PackedBatch,
        generators: Mapping[int, GeneratorWeights],
        *,
        trunk: Trunk | None = None,
        tuning: BackboneTuning | None = None,
    ) -> ForwardOutput:
        """Run a batch up to the states that its heads read.

        Args:
            generators: by the batch's adapter index.
            trunk: the states below the lowest insertion layer, if the caller has kept them.
            tuning: the adapters' changes to the layers.

        Returns:
            States [rows, n] in the batch's order; `batch.order` says where the caller has each row.
        """
        lowest = self.trunk_layers(batch)
        words = None if trunk is not None else self.words(batch, generators)
        trunk = self.trunk(batch, lowest, start=trunk, tuning=tuning, words=words)
        insertions = {insertion.layer: insertion for insertion in batch.insertions}
        hidden, layout = trunk.hidden, batch.layout
        token_weights: list[tuple[Generation, Tensor]] = []
        generator_seconds = 0.0
        for index in range(lowest, self.layers):
            if (insertion := insertions.get(index)) is not None:
                started = perf_counter()
                prompts, weights = _prompts(insertion, hidden, trunk.embeddings, generators)
                generator_seconds += perf_counter() - started
                hidden = torch.cat([hidden, *prompts]).index_select(0, insertion.expand)
                layout = insertion.layout
                token_weights += weights
            if index < self.layers - 1:
                hidden = self.run_layers(hidden, index, index + 1, layout, tuning)
        states = pool_rows(self.read(hidden, batch.reads, layout, tuning), batch.read_layout)
        return ForwardOutput(states, tuple(token_weights), generator_seconds)

    def trunk_layers(self, batch: PackedBatch) -> int:
        """The layers below the lowest insertion, at most all but the last: `trunk` runs them."""
        return batch.insertions[0].layer if batch.insertions else self.layers - 1

    def words(
        self, batch: PackedBatch, generators: Mapping[int, GeneratorWeights]
    ) -> Tensor | None:
        """The word embeddings with the adapters' tables, [T, width]; None if there are none."""
        tables = {
            index: weights.table
            for index, weights in generators.items()
            if weights.table is not None
        }
        if not tables:
            return None
        return add_tables(self.word_embeddings(batch.input_ids), batch, tables)


def check_fits(spec: AdapterSpec, host: Host) -> None:
    """Refuse a spec that was made for another backbone.

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
    if spec.prompt is not None:
        faults += _prompt_faults(spec.prompt, host)
    if spec.tuning is not None:
        if (end := spec.tuning.layers[1]) > host.layers:
            faults.append(
                f"tuning.layers: up to {end - 1}, the backbone has layers 0..{host.layers - 1}"
            )
        if spec.tuning.intermediate_size != host.intermediate_size:
            faults.append(
                f"tuning.intermediate_size: {spec.tuning.intermediate_size}, "
                f"the backbone's is {host.intermediate_size}"
            )
    if spec.positions > host.max_tokens:
        shift = spec.positions - spec.max_length
        after = f" after a prompt of {shift}" if shift else ""
        faults.append(
            f"max_length: {spec.max_length}{after}, the backbone takes {host.max_tokens} tokens"
        )
    if faults:
        raise IncompatibleAdapter(faults)


def _prompt_faults(prompt: Prompt, host: Host) -> list[str]:
    faults = []
    if prompt.layer >= host.layers:
        faults.append(f"prompt.layer: {prompt.layer}, the backbone has layers 0..{host.layers - 1}")
    if isinstance(prompt, StaticPrompt) and prompt.table is not None:
        width = prompt.table.width
        if width != host.embedding_size:
            faults.append(
                f"prompt.table.width: {width}, the word embeddings of the backbone have "
                f"{host.embedding_size}"
            )
    return faults


def random_adapter(backbone: Backbone, *, seed: int = 0) -> Adapter:
    """A seeded adapter of the size that `fit` makes by default, to warm up, probe and measure."""
    n = backbone.hidden_size
    spec = AdapterSpec(
        backbone=backbone.identity,
        tokenizer_sha256=backbone.encoder.sha256,
        hidden_size=n,
        prompt=AttentionPrompt(
            length=10,
            layer=backbone.layers // 2,
            source=GeneratorInput.HIDDEN,
            bottleneck=34,
            attention_size=n,
            final_activation=FinalActivation.NONE,
        ),
        labels=("no", "yes"),
        max_length=min(256, backbone.max_tokens),
    )
    return random_of(spec, seed=seed)


def random_of(spec: AdapterSpec, *, seed: int = 0) -> Adapter:
    """A seeded adapter with this spec."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=random) * _spread(name, shape)
        for name, shape in spec.shapes().items()
    }
    return Adapter(spec, tensors)


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """A tuning changes the outputs of a layer by a tenth."""
    if not name.startswith("tuning."):
        return 1.0 / math.sqrt(shape[0])
    # [L, inputs, outputs] of a matrix, [L, width] of vectors.
    return 0.3 / math.sqrt(shape[1]) if len(shape) == 3 else 0.1


def _prompts(
    insertion: Insertion,
    hidden: Tensor,
    embeddings: Tensor | None,
    generators: Mapping[int, GeneratorWeights],
) -> tuple[list[Tensor], list[tuple[Generation, Tensor]]]:
    prompts, weights = [], []
    for generation in insertion.generations:
        source = embeddings if generation.source is PromptSource.EMBEDDINGS else hidden
        assert source is not None, "a kept trunk lacks the embeddings that its batch needs"
        prompt, w = generate(source, generation, generators)
        prompts.append(prompt)
        if w is not None:
            weights.append((generation, w))
    return prompts, weights
