"""What serving many adapters costs with plain `transformers`: one padded batch per adapter.

The unmodified model with PyTorch's attention, the texts of an adapter sorted by length, its prompt
put in front of the hidden states at its insertion layer: the same answer as the engine's, which
`benchmarks.engine` checks before it times anything. All adapters stay on the device, so switching
costs nothing but the smaller batches.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel

from adapters.backbone.loading import DEFAULT_BACKBONE, locate_default
from adapters.backbone.tokenizer import Encoding
from adapters.format.files import Adapter
from adapters.format.spec import GeneratorInput
from adapters.packed.head import HeadWeights, logits, scores
from adapters.packed.prompt import GeneratorWeights, soft_prompt

# Rows of one batch at most: of sorted texts, more rows are more padding and little more speed.
MAX_ROWS = 64


@dataclass(frozen=True, slots=True)
class Padded:
    """Texts side by side. input_ids: int64 [B, S]. real: bool [B, S], or None if none is padded."""

    input_ids: Tensor
    real: Tensor | None

    def attention_mask(self) -> Tensor | None:
        """[B, 1, S, S], as scaled_dot_product_attention takes it."""
        if self.real is None:
            return None
        rows, length = self.real.shape
        return self.real[:, None, None, :].expand(rows, 1, length, length)


def plain_model(source: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The backbone as `transformers` loads it, with PyTorch's attention and nothing of ours."""
    # Padded batches hardly ever have the shape of another, and cuDNN's attention plans each new one
    # for tens of milliseconds; PyTorch's memory-efficient one takes masks too.
    torch.backends.cuda.enable_cudnn_sdp(False)
    place, revision = (source, None) if source != DEFAULT_BACKBONE else locate_default()
    model: Any = AutoModel.from_pretrained(
        place, revision=revision, dtype=dtype, attn_implementation="sdpa"
    )
    # As for the engine's backbone: nobody reads what it makes.
    model.pooler = None
    moved: nn.Module = model.eval().requires_grad_(False).to(device)
    return moved


def pad(encodings: Sequence[Encoding], model: nn.Module) -> Padded:
    """One batch, on the model's device."""
    config: Any = model.config
    device = next(model.parameters()).device
    lengths = np.array([len(item) for item in encodings])
    ids = np.full((len(encodings), lengths.max()), config.pad_token_id, dtype=np.int64)
    for row, item in enumerate(encodings):
        ids[row, : len(item)] = item.input_ids
    if (lengths == lengths.max()).all():
        return Padded(torch.from_numpy(ids).to(device), None)
    real = np.arange(lengths.max()) < lengths[:, None]
    return Padded(torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device))


def by_length(encodings: Sequence[Encoding]) -> list[int]:
    return sorted(range(len(encodings)), key=lambda index: len(encodings[index]))


class PaddedAdapters:
    """Adapters that insert at one layer of a plain BERT or RoBERTa, and their heads."""

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._model: Any = model
        parameter = next(model.parameters())
        self._specs = [adapter.spec for adapter in adapters]
        assert all(spec.generator_input is GeneratorInput.HIDDEN for spec in self._specs)
        moved = [
            {name: tensor.to(parameter.device) for name, tensor in adapter.tensors.items()}
            for adapter in adapters
        ]
        # Folded like the engine's: the comparison is about batches, not about this product.
        self._generators = [
            GeneratorWeights.of(spec, tensors).folded().cast(parameter.dtype)
            for spec, tensors in zip(self._specs, moved, strict=True)
        ]
        self._heads = [HeadWeights.of(tensors) for tensors in moved]

    def classify(self, texts: Sequence[tuple[int, Encoding]]) -> list[npt.NDArray[np.float32]]:
        """Scores of texts, each (index of its adapter, encoding), in their order."""
        made = []
        for adapter, rows in _by_adapter(texts).items():
            for chosen in _batches(rows, texts):
                padded = pad([texts[row][1] for row in chosen], self._model)
                made.append((chosen, self._batch(adapter, padded)))
        # Only now: waiting for each batch would keep the device waiting for the next.
        found: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(texts)
        for chosen, batch in made:
            for row, values in zip(chosen, batch.cpu().numpy(), strict=True):
                found[row] = values
        return found

    @torch.inference_mode()
    def _batch(self, adapter: int, padded: Padded) -> Tensor:
        spec, generator = self._specs[adapter], self._generators[adapter]
        layers = self._model.encoder.layer
        hidden = self._model.embeddings(input_ids=padded.input_ids)
        mask = padded.attention_mask()
        for layer in layers[: spec.insertion_layer]:
            hidden = layer(hidden, mask)
        prompts = _prompts(hidden, padded.real, generator)
        hidden = torch.cat([prompts, hidden], dim=1)
        if padded.real is not None:
            real = nn.functional.pad(padded.real, (spec.prompt_length, 0), value=True)
            mask = Padded(padded.input_ids, real).attention_mask()
        for layer in layers[spec.insertion_layer :]:
            hidden = layer(hidden, mask)
        read = logits(hidden[:, spec.prompt_length], self._heads[adapter])
        return scores(read, spec.activation, spec.calibration.temperature)


class PaddedPlain:
    """The same batches without prompts and heads: no way to run one batch an adapter is faster."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.inference_mode()
    def classify(self, texts: Sequence[tuple[int, Encoding]]) -> list[Tensor]:
        """The first token's states, batch by batch, on the host."""
        found = []
        for rows in _by_adapter(texts).values():
            for chosen in _batches(rows, texts):
                padded = pad([texts[row][1] for row in chosen], self._model)
                mask = None if padded.real is None else padded.real.long()
                states = self._model(input_ids=padded.input_ids, attention_mask=mask)
                found.append(states.last_hidden_state[:, 0])
        return [states.cpu() for states in found]


def _by_adapter(texts: Sequence[tuple[int, Encoding]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for row, (adapter, _) in enumerate(texts):
        found[adapter].append(row)
    return found


def _batches(rows: Sequence[int], texts: Sequence[tuple[int, Encoding]]) -> list[list[int]]:
    ordered = sorted(rows, key=lambda row: len(texts[row][1]))
    return [ordered[start : start + MAX_ROWS] for start in range(0, len(ordered), MAX_ROWS)]


def _prompts(hidden: Tensor, real: Tensor | None, generator: GeneratorWeights) -> Tensor:
    """`adapters.packed.prompt`, of padded texts: [B, S, n] -> [B, t, n]."""
    rows, length, n = hidden.shape
    if real is None:
        real = torch.ones(rows, length, dtype=torch.bool, device=hidden.device)
    assert generator.query is not None
    products = torch.bmm(hidden @ generator.query, hidden.transpose(1, 2)).float()
    shares = products.masked_fill(~real[:, None, :], -torch.inf).softmax(dim=-1)
    weights = (shares * real[:, :, None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
    pooled = torch.bmm(weights.unsqueeze(1), hidden.float()).squeeze(1)
    return soft_prompt(pooled, generator).view(rows, -1, n).to(hidden.dtype)
