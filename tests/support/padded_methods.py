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
    if method == "lora":
        changed = _merged(model, changed)
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
    prompts = tensors["prompt"].expand(len(batch.mask), -1, -1)
    return _after_prompts(model, _embedded(model, batch), prompts, batch, layer=0)


def _p_tuning(model: Any, tensors: Tensors, _: Design, batch: Padded) -> Read:
    w = tensors
    states = torch.relu(w["free"] @ w["weights.0"] + w["biases.0"])
    states = torch.relu(states @ w["weights.1"] + w["biases.1"])
    prompts = (states @ w["weights.2"] + w["biases.2"]).expand(len(batch.mask), -1, -1)
    return _after_prompts(model, _embedded(model, batch), prompts, batch, layer=0)


def _smop(model: Any, tensors: Tensors, _: Design, batch: Padded) -> Read:
    hidden = _embedded(model, batch)
    shares = (_masked_mean(hidden, batch.mask) @ tensors["router"]).softmax(dim=-1)
    prompts = []
    for row in shares:
        chosen = int(row.argmax())
        prompts.append(tensors["bank"][chosen] * row[chosen])
    return _after_prompts(model, hidden, torch.stack(prompts), batch, layer=0)


def _lpt(model: Any, tensors: Tensors, design: Design, batch: Padded) -> Read:
    hidden = _through(model, _embedded(model, batch), batch.mask, slice(design.insertion_layer))
    narrow = torch.relu(hidden[:, 0] @ tensors["down"] + tensors["down_bias"])
    prompts = (narrow @ tensors["up"] + tensors["up_bias"]).view(
        len(hidden), design.prompt_length, -1
    )
    return _after_prompts(model, hidden, prompts, batch, layer=design.insertion_layer)


def _dept(model: Any, tensors: Tensors, _: Design, batch: Padded) -> Read:
    table = 8 / math.sqrt(45) * tensors["table_a"] @ tensors["table_b"]
    places = torch.arange(batch.mask.shape[1]).clamp(max=len(table) - 1)
    words = _words(model, batch) + table[places]
    prompts = tensors["prompt"].expand(len(batch.mask), -1, -1)
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


def _merged(model: Any, tensors: Tensors) -> dict[str, Tensor]:
    """LoRA's matrices in the weights that they change: W + (alpha / r) B A, alpha 16, r 8."""
    weights = {f"model.{name}": value for name, value in model.named_parameters()}
    merged = {}
    for name, down in tensors.items():
        if ".lora_A." in name:
            change = 16 / 8 * tensors[name.replace(".lora_A.", ".lora_B.")] @ down
            target = f"{name.partition('.lora_A.')[0]}.weight"
            # GPT-2 keeps its weights as [inputs, outputs].
            transposed = model.config.model_type == "gpt2"
            merged[target] = weights[target] + (change.T if transposed else change)
    return merged


_METHODS: Mapping[str, Callable[[Any, Tensors, Design, Padded], Read]] = {
    "idspam": _idspam,
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
