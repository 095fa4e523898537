"""A second implementation of every method: padded batches, a mask, Hugging Face's own layers.

From `train` it uses only the design and the names of the trained tensors. `good_or_bad` is a small
task that every method can learn.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from tests.support.reference import layers_of, tokenize
from train.data.dataset import Dataset, Example
from train.methods.method import Design

Text: TypeAlias = tuple[str, str | None]
Tensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Padded:
    """Texts of any length as one batch [B, S]; mask is True where there is a token."""

    inputs: dict[str, Tensor]
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Read:
    """States of the last layer, [B, T, n], and a mask of the text's own tokens among them."""

    states: Tensor
    text: Tensor  # bool [B, T]


def pad(
    model: Any, tokenizer: PreTrainedTokenizerFast, texts: Sequence[Text], *, max_length: int
) -> Padded:
    """Tokens from the tokenizer's own call, padded at the end."""
    rows = [tokenize(model, tokenizer, *text, max_length=max_length) for text in texts]
    padding = {"input_ids": getattr(model.config, "pad_token_id", None) or 0}
    inputs = {
        name: pad_sequence(
            [row[name][0] for row in rows],
            batch_first=True,
            padding_value=padding.get(name, 0),
        )
        for name in rows[0]
    }
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    return Padded(inputs, torch.arange(int(lengths.max())) < lengths[:, None])


def padded_logits(
    method: str, model: Any, tensors: Tensors, design: Design, batch: Padded
) -> Tensor:
    """Logits [B, labels] of a method, with gradients for `tensors`."""
    changed = {name: value for name, value in tensors.items() if name.startswith("model.")}
    changed |= _merged(model, tensors, design)
    run = _Holder(model)
    read: Read = functional_call(run, changed, (_METHODS[method], tensors, design, batch))
    mean = design.pooling == "mean" or method == "head-only-mean"
    return _head(_pooled(model, read, mean=mean), tensors)


class _Holder(nn.Module):
    """A model whose weights can be given other values for one call, by the names `model.<name>`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        compute: Callable[[Any, Tensors, Design, Padded], Read],
        tensors: Tensors,
        design: Design,
        batch: Padded,
    ) -> Read:
        return compute(self.model, tensors, design, batch)


def _words(model: Any, batch: Padded) -> Tensor:
    embeddings: Tensor = model.get_input_embeddings()(batch.inputs["input_ids"])
    return embeddings


def _embedded(model: Any, batch: Padded, words: Tensor | None = None) -> Tensor:
    """[B, S, n], the input of the first layer; `words` replace the word embeddings."""
    types = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    outputs = model(
        inputs_embeds=_words(model, batch) if words is None else words,
        attention_mask=batch.mask.long(),
        output_hidden_states=True,
        **types,
    )
    states: Tensor = outputs.hidden_states[0]
    return states


def _through(model: Any, hidden: Tensor, mask: Tensor, layers: slice) -> Tensor:
    """[B, T, n] through some layers; only positions in `mask`, bool [B, T], are seen."""
    seen = mask[:, None, None, :]
    if model.config.model_type == "gpt2":
        length = mask.shape[1]
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for layer in layers_of(model)[layers]:
        output = layer(hidden, attention_mask=additive)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def _finished(model: Any, hidden: Tensor) -> Tensor:
    states: Tensor = model.ln_f(hidden) if model.config.model_type == "gpt2" else hidden
    return states


def _after_prompts(
    model: Any, hidden: Tensor, prompts: Tensor, batch: Padded, *, layer: int
) -> Read:
    """Run on from `layer` with `prompts`, [B, t, n], in front of [BOS]."""
    slots = torch.ones(prompts.shape[:2], dtype=torch.bool)
    mask = torch.cat([slots, batch.mask], dim=1)
    joined = torch.cat([prompts, hidden], dim=1)
    states = _through(model, joined, mask, slice(layer, None))
    return Read(_finished(model, states), torch.cat([~slots, batch.mask], dim=1))


def _pooled(model: Any, read: Read, *, mean: bool) -> Tensor:
    """[B, n]: the text's mean, or its first token (the last one of a causal model)."""
    if mean:
        return _masked_mean(read.states, read.text)
    places = torch.arange(read.text.shape[1])
    causal = model.config.model_type == "gpt2"
    last = torch.where(read.text, places, -1).amax(dim=1)
    first = torch.where(read.text, places, len(places)).amin(dim=1)
    return read.states[torch.arange(len(read.states)), last if causal else first]


def _masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _head(states: Tensor, tensors: Tensors) -> Tensor:
    head = {name.replace("_", ".").removesuffix(".weight"): tensors[name] for name in tensors}
    if "head.dense" in head:
        states = torch.tanh(states @ head["head.dense"] + head["head.dense.bias"])
    bias = head["head.out.bias"] if "head.out.bias" in head else head["head.bias"]
    return states @ head["head.out"] + bias


def _idspam(model: Any, tensors: Tensors, design: Design, batch: Padded) -> Read:
    embedded = _embedded(model, batch)
    hidden = _through(model, embedded, batch.mask, slice(design.insertion_layer))
    source = embedded if design.generator_input == "embeddings" else hidden
    w = {name.removeprefix("generator."): value for name, value in tensors.items()}
    pooled = _masked_mean(source, batch.mask) @ w["value"]
    if design.generator_pooling == "attention":
        queries, keys = source @ w["query"], source @ w["key"]
        scores = queries @ keys.transpose(1, 2) / math.sqrt(design.attention_size)
        scores = scores.masked_fill(~batch.mask[:, None, :], -math.inf)
        pooled = _masked_mean(scores.softmax(dim=-1) @ (source @ w["value"]), batch.mask)
    narrow = torch.relu(pooled @ w["down.weight"] + w["down.bias"])
    flat = narrow @ w["up.weight"] + w["up.bias"]
    if design.final_activation != "none":
        flat = torch.relu(flat) if design.final_activation == "relu" else torch.tanh(flat)
    prompts = flat.view(len(pooled), design.prompt_length, -1)
    return _after_prompts(model, hidden, prompts, batch, layer=design.insertion_layer)


def _plain(model: Any, _: Tensors, __: Design, batch: Padded) -> Read:
    """No prompt: the head only, and what changes the model's own weights."""
    outputs = model(**batch.inputs, attention_mask=batch.mask.long())
    return Read(outputs.last_hidden_state, batch.mask)


def _prompt_tuning(model: Any, tensors: Tensors, _: Design, batch: Padded) -> Read:
    prompts = tensors["prompt.vectors"].expand(len(batch.mask), -1, -1)
    return _after_prompts(model, _embedded(model, batch), prompts, batch, layer=0)


def _p_tuning(model: Any, tensors: Tensors, _: Design, batch: Padded) -> Read:
    w = tensors
    states = torch.relu(w["prompt.free"] @ w["prompt.weights.0"] + w["prompt.biases.0"])
    states = torch.relu(states @ w["prompt.weights.1"] + w["prompt.biases.1"])
    prompts = (states @ w["prompt.weights.2"] + w["prompt.biases.2"]).expand(
        len(batch.mask), -1, -1
    )
    return _after_prompts(model, _embedded(model, batch), prompts, batch, layer=0)


def _smop(model: Any, tensors: Tensors, _: Design, batch: Padded) -> Read:
    hidden = _embedded(model, batch)
    shares = (_masked_mean(hidden, batch.mask) @ tensors["generator.router"]).softmax(dim=-1)
    prompts = []
    for row in shares:
        chosen = int(row.argmax())
        bank = tensors["generator.bank"][chosen].view(-1, hidden.shape[-1])
        prompts.append(bank * row[chosen])
    return _after_prompts(model, hidden, torch.stack(prompts), batch, layer=0)


def _lpt(model: Any, tensors: Tensors, design: Design, batch: Padded) -> Read:
    hidden = _through(model, _embedded(model, batch), batch.mask, slice(design.insertion_layer))
    narrow = torch.relu(
        hidden[:, 0] @ tensors["generator.down.weight"] + tensors["generator.down.bias"]
    )
    prompts = (narrow @ tensors["generator.up.weight"] + tensors["generator.up.bias"]).view(
        len(hidden), design.prompt_length, -1
    )
    return _after_prompts(model, hidden, prompts, batch, layer=design.insertion_layer)


def _dept(model: Any, tensors: Tensors, _: Design, batch: Padded) -> Read:
    table = tensors["prompt.table.a"] @ tensors["prompt.table.b"]
    places = torch.arange(batch.mask.shape[1]).clamp(max=len(table) - 1)
    words = _words(model, batch) + table[places]
    prompts = tensors["prompt.vectors"].expand(len(batch.mask), -1, -1)
    return _after_prompts(model, _embedded(model, batch, words), prompts, batch, layer=0)


def _idpg(model: Any, tensors: Tensors, _: Design, batch: Padded) -> Read:
    """As in the source: the prompts come after [BOS], and every layer has its own."""
    frozen = model(**batch.inputs, attention_mask=batch.mask.long()).last_hidden_state[:, 0]
    prompts = functional.gelu(frozen @ tensors["down"]) @ tensors["up"]
    hidden = _embedded(model, batch)
    rows, _length, n = hidden.shape
    slots = torch.ones(rows, 5, dtype=torch.bool)
    first, others = batch.mask[:, :1], batch.mask[:, 1:]
    mask = torch.cat([first, slots, others], dim=1)
    for layer, bias in enumerate(tensors["biases"]):
        text = hidden[:, 1:] if layer == 0 else hidden[:, 6:]
        hidden = torch.cat([hidden[:, :1], (prompts + bias).view(rows, 5, n), text], dim=1)
        hidden = _through(model, hidden, mask, slice(layer, layer + 1))
    return Read(hidden, torch.cat([first, ~slots, others], dim=1))


# By family: the modules at the sites of layer i. GPT-2 has queries, keys and values joined.
_BERT_SITES = {
    "query": "encoder.layer.{}.attention.self.query",
    "key": "encoder.layer.{}.attention.self.key",
    "value": "encoder.layer.{}.attention.self.value",
    "dense": "encoder.layer.{}.attention.output.dense",
    "up": "encoder.layer.{}.intermediate.dense",
    "down": "encoder.layer.{}.output.dense",
}
_SITES = {
    "distilbert": {
        "query": "transformer.layer.{}.attention.q_lin",
        "key": "transformer.layer.{}.attention.k_lin",
        "value": "transformer.layer.{}.attention.v_lin",
        "dense": "transformer.layer.{}.attention.out_lin",
        "up": "transformer.layer.{}.ffn.lin1",
        "down": "transformer.layer.{}.ffn.lin2",
    },
    "gpt2": {
        "query": "h.{}.attn.c_attn",
        "key": "h.{}.attn.c_attn",
        "value": "h.{}.attn.c_attn",
        "dense": "h.{}.attn.c_proj",
        "up": "h.{}.mlp.c_fc",
        "down": "h.{}.mlp.c_proj",
    },
}


def _merged(model: Any, tensors: Tensors, design: Design) -> dict[str, Tensor]:
    """The weights and biases that a tuning makes of the model's, by the names `model.<name>`.

    Vectors: W (1 + s), b0 (1 + s) + b. LoRA: W + scaling B A.
    """
    n, merged = model.config.hidden_size, _Weights(model)
    first, _ = design.tuned_layers or (0, 0)
    if "tuning.scale" in tensors:
        for layer, (scale, bias) in enumerate(
            zip(tensors["tuning.scale"], tensors["tuning.bias"], strict=True), start=first
        ):
            wide = len(scale) - 3 * n
            scales = dict(
                zip(("query", "key", "value", "up"), scale.split([n] * 3 + [wide]), strict=True)
            )
            shifts = bias.split([n] * 3 + [wide, n])
            for site, shift in zip((*scales, "down"), shifts, strict=True):
                factor = 1 + scales.get(site, torch.zeros(n))
                weight, own = merged.of(site, layer)
                merged.put(site, layer, weight * factor[:, None], own * factor + shift)
    for site in (
        name.split(".")[1] for name in tensors if name.startswith("tuning.") and name.endswith(".a")
    ):
        a, b = tensors[f"tuning.{site}.a"], tensors[f"tuning.{site}.b"]
        for layer, change in enumerate(design.scaling * (a @ b), start=first):
            weight, own = merged.of(site, layer)
            merged.put(site, layer, weight + change.T, own)
    return merged.changed


class _Weights:
    """A model's weights at the sites of its layers, as [outputs, inputs]; `changed` by name."""

    def __init__(self, model: Any) -> None:
        self._own = {f"model.{name}": value for name, value in model.named_parameters()}
        self._kind = model.config.model_type
        self._n = model.config.hidden_size
        self.changed: dict[str, Tensor] = {}

    def of(self, site: str, layer: int) -> tuple[Tensor, Tensor]:
        weight, bias, part = self._read(site, layer)
        return weight[part], bias[part]

    def put(self, site: str, layer: int, weight: Tensor, bias: Tensor) -> None:
        name = self._name(site, layer)
        all_weights, all_biases, part = self._read(site, layer)
        rows = torch.arange(len(all_weights))[part]
        all_weights = all_weights.index_copy(0, rows, weight)
        self.changed[f"{name}.weight"] = all_weights.T if self._kind == "gpt2" else all_weights
        self.changed[f"{name}.bias"] = all_biases.index_copy(0, rows, bias)

    def _name(self, site: str, layer: int) -> str:
        return "model." + _SITES.get(self._kind, _BERT_SITES)[site].format(layer)

    def _read(self, site: str, layer: int) -> tuple[Tensor, Tensor, slice]:
        name, everything = self._name(site, layer), self._own | self.changed
        weight, bias = everything[f"{name}.weight"], everything[f"{name}.bias"]
        # GPT-2 keeps its weights as [inputs, outputs].
        if self._kind != "gpt2":
            return weight, bias, slice(None)
        parts = ("query", "key", "value")
        first = parts.index(site) * self._n if site in parts else 0
        return weight.T, bias, slice(first, first + self._n) if site in parts else slice(None)


_METHODS: Mapping[str, Callable[[Any, Tensors, Design, Padded], Read]] = {
    "idspam": _idspam,
    "idspam+vectors": _idspam,
    "idspam-paper": _idspam,
    "head-only": _plain,
    "head-only-mean": _plain,
    "prompt-tuning": _prompt_tuning,
    "p-tuning": _p_tuning,
    "smop": _smop,
    "lpt": _lpt,
    "dept": _dept,
    "idpg": _idpg,
    "lora": _plain,
    "vectors": _plain,
    "fine-tuning": _plain,
}


def good_or_bad(rows: int, *, seed: int, paired: bool = False) -> Dataset:
    """Texts that say good or bad among other words; of a pair the second one does."""
    draw = random.Random(seed)
    examples = []
    for _ in range(rows):
        label = draw.choice(("good", "bad"))
        words = [draw.choice(("the", "card", "my", "call", "you", "now")) for _ in range(7)]
        words = words[: draw.randint(1, 7)]
        words.insert(draw.randint(0, len(words)), label)
        text = " ".join(words)
        examples.append(Example("is it", text, label) if paired else Example(text, None, label))
    return Dataset(f"made-{seed}", f"{seed:064x}", tuple(examples))
