"""Serving many adapters with plain `transformers`: one padded batch per adapter.

The unmodified model with PyTorch's attention. The texts of an adapter are sorted by length; its
prompt is put before the hidden states at its insertion layer. The answers are the engine's, which
`benchmarks.engine` checks before it times anything. All adapters stay on the device, so switching
costs only the smaller batches.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel

from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec, AttentionPrompt, GeneratorInput
from adapters.packed.head import HeadWeights, logits, scores
from adapters.packed.prompt import GeneratorWeights, soft_prompt
from adapters.tokenizer import Encoding
from benchmarks.shapes import place_of

# Rows of a batch at most: with sorted texts, more rows mean more padding and little more speed.
MAX_ROWS = 64


@dataclass(frozen=True, slots=True)
class Padded:
    """A padded batch. input_ids: int64 [B, S]. real: bool [B, S], or None without padding."""

    input_ids: Tensor
    real: Tensor | None

    def attention_mask(self) -> Tensor | None:
        """[B, 1, S, S], for scaled_dot_product_attention."""
        if self.real is None:
            return None
        rows, length = self.real.shape
        return self.real[:, None, None, :].expand(rows, 1, length, length)


def plain_model(source: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The backbone as `transformers` loads it, with PyTorch's attention and none of our code."""
    # Nearly every padded batch has a new shape. cuDNN's attention plans a new shape for tens of
    # milliseconds; PyTorch's memory-efficient attention does not, and takes masks, too.
    torch.backends.cuda.enable_cudnn_sdp(False)
    place = place_of(source)
    model: Any = AutoModel.from_pretrained(place, dtype=dtype, attn_implementation="sdpa")
    # Its output is not used, as in the engine's backbone.
    model.pooler = None
    moved: nn.Module = model.eval().requires_grad_(False).to(device)
    return moved


def pad(encodings: Sequence[Encoding], model: nn.Module) -> Padded:
    """One batch, on the model's device."""
    config: Any = model.config
    device = next(model.parameters()).device
    lengths = np.array([len(encoding) for encoding in encodings])
    ids = np.full((len(encodings), lengths.max()), config.pad_token_id, dtype=np.int64)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)] = encoding.input_ids
    if (lengths == lengths.max()).all():
        return Padded(torch.from_numpy(ids).to(device), None)
    real = np.arange(lengths.max()) < lengths[:, None]
    return Padded(torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device))


def first_states(model: Any, padded: Padded, **options: Any) -> Tensor:
    """The model's states at the first token of every row, [B, n]."""
    mask = None if padded.real is None else padded.real.long()
    output = model(input_ids=padded.input_ids, attention_mask=mask, **options)
    states: Tensor = output.last_hidden_state[:, 0]
    return states


class PaddedAdapters:
    """A plain BERT or RoBERTa with adapters: prompts inserted at a layer, and heads."""

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._model: Any = model
        parameter = next(model.parameters())
        self._specs = [adapter.spec for adapter in adapters]
        self._prompts = [_prompt_of(spec) for spec in self._specs]
        moved = [
            {name: tensor.to(parameter.device) for name, tensor in adapter.tensors.items()}
            for adapter in adapters
        ]
        # Folded as in the engine: batches are compared, not this product.
        self._generators = [
            GeneratorWeights.of(prompt, tensors).folded().cast(parameter.dtype)
            for prompt, tensors in zip(self._prompts, moved, strict=True)
        ]
        self._heads = [HeadWeights.of(tensors) for tensors in moved]

    def classify(self, texts: Sequence[tuple[int, Encoding]]) -> list[npt.NDArray[np.float32]]:
        """Scores of texts, each (index of its adapter, encoding), in their order."""
        batches = [
            (rows, self._batch(adapter, pad([texts[row][1] for row in rows], self._model)))
            for adapter, rows in _batches(texts)
        ]
        # Copied only now: waiting for each batch would keep the device waiting for the next.
        answers: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(texts)
        for rows, batch in batches:
            for row, values in zip(rows, batch.cpu().numpy(), strict=True):
                answers[row] = values
        return answers

    @torch.inference_mode()
    def _batch(self, adapter: int, padded: Padded) -> Tensor:
        spec, prompt = self._specs[adapter], self._prompts[adapter]
        generator = self._generators[adapter]
        layers = self._model.encoder.layer
        hidden = self._model.embeddings(input_ids=padded.input_ids)
        mask = padded.attention_mask()
        for layer in layers[: prompt.layer]:
            hidden = layer(hidden, mask)
        prompts = _prompts(hidden, padded.real, generator)
        hidden = torch.cat([prompts, hidden], dim=1)
        if padded.real is not None:
            real = nn.functional.pad(padded.real, (prompt.length, 0), value=True)
            mask = Padded(padded.input_ids, real).attention_mask()
        for layer in layers[prompt.layer :]:
            hidden = layer(hidden, mask)
        outputs = logits(hidden[:, prompt.length], self._heads[adapter])
        return scores(outputs, spec.activation, spec.calibration.temperature)


def _prompt_of(spec: AdapterSpec) -> AttentionPrompt:
    assert isinstance(spec.prompt, AttentionPrompt)
    assert spec.prompt.source is GeneratorInput.HIDDEN
    return spec.prompt


class PaddedPlain:
    """The same batches without prompts and heads: an upper bound of one batch per adapter."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.inference_mode()
    def classify(self, texts: Sequence[tuple[int, Encoding]]) -> list[Tensor]:
        """The states of the first tokens, batch by batch, on the host."""
        batches = [
            first_states(self._model, pad([texts[row][1] for row in rows], self._model))
            for _, rows in _batches(texts)
        ]
        return [states.cpu() for states in batches]


def _batches(texts: Sequence[tuple[int, Encoding]]) -> Iterator[tuple[int, list[int]]]:
    """(adapter, rows) of batches that hold one adapter each, sorted by length."""
    by_adapter: dict[int, list[int]] = defaultdict(list)
    for row, (adapter, _) in enumerate(texts):
        by_adapter[adapter].append(row)
    for adapter, rows in by_adapter.items():
        rows.sort(key=lambda row: len(texts[row][1]))
        for start in range(0, len(rows), MAX_ROWS):
            yield adapter, rows[start : start + MAX_ROWS]


def _prompts(hidden: Tensor, real: Tensor | None, generator: GeneratorWeights) -> Tensor:
    """`adapters.packed.prompt` for padded texts: [B, S, n] -> [B, t, n]."""
    rows, length, n = hidden.shape
    if real is None:
        real = torch.ones(rows, length, dtype=torch.bool, device=hidden.device)
    assert generator.query is not None
    products = torch.bmm(hidden @ generator.query, hidden.transpose(1, 2)).float()
    shares = products.masked_fill(~real[:, None, :], -torch.inf).softmax(dim=-1)
    weights = (shares * real[:, :, None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
    pooled = torch.bmm(weights.unsqueeze(1), hidden.float()).squeeze(1)
    return soft_prompt(pooled, generator).view(rows, -1, n).to(hidden.dtype)
