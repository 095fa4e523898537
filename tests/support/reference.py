"""The reference for exactness: one text alone through Hugging Face's own forward pass.

It uses nothing of `adapters` but the spec. The tokenizer truncates, the prompt comes from the
equation as printed, token by token in float64, and the model runs its own `forward` with eager
attention. What a tuning changes is done by forward hooks on the model's modules.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    FirstTokenPrompt,
    LoraTuning,
    RoutedPrompt,
    VectorTuning,
)

Array = npt.NDArray[np.float64]


def answer_alone(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    spec: AdapterSpec,
    tensors: dict[str, Tensor],
    text: str,
    pair: str | None,
) -> tuple[Array, Array]:
    """Scores [labels] and token weights [tokens] of one text; no weights without such a prompt."""
    inputs = tokenize(model, tokenizer, text, pair, max_length=spec.max_length)
    t, causal = spec.prompt_length, model.config.model_type == "gpt2"
    if spec.positions > spec.max_length:
        first = t + (
            model.embeddings.padding_idx + 1 if "roberta" in model.config.model_type else 0
        )
        inputs["position_ids"] = first + torch.arange(inputs["input_ids"].shape[1])[None]
    weights = np.empty(0)
    with torch.no_grad(), tuned(model, spec, tensors), _with_table(model, tensors):
        if spec.prompt is None:
            last = model(**inputs).last_hidden_state[0]
        else:
            embedded, entering = _states_below(model, inputs, spec.prompt.layer)
            prompt, weights = _prompt(embedded, entering, spec, tensors)
            last = _with_prompt(model, inputs, spec.prompt.layer, torch.from_numpy(prompt).float())
    match spec.head.pooling:
        case "mean":
            read = last[t:].mean(dim=0)
        case "first":
            read = last[0]
        case "before-last":
            read = last[max(len(last) - 2, t)]
        case _:
            read = last[-1] if causal else last[t]
    return _scores(read.double().numpy(), spec, tensors), weights


def _prompt(
    embedded: Tensor, entering: Tensor, spec: AdapterSpec, tensors: dict[str, Tensor]
) -> tuple[Array, Array]:
    """Prompt [t, n] and token weights [S] of any kind of prompt, in float64."""
    prompt, tokens = spec.prompt, len(embedded)
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    match prompt:
        case AttentionPrompt():
            source = embedded if prompt.source == "embeddings" else entering
            return naive_prompt(source.double().numpy(), spec, tensors)
        case FirstTokenPrompt():
            first = entering[0].double().numpy()
            narrow = np.maximum(first @ w["generator.down.weight"] + w["generator.down.bias"], 0)
            flat = narrow @ w["generator.up.weight"] + w["generator.up.bias"]
            weights = np.eye(tokens)[0]
        case RoutedPrompt():
            routed = embedded.double().numpy().mean(axis=0) @ w["generator.router"]
            shares = np.exp(routed - routed.max())
            shares /= shares.sum()
            chosen = int(shares.argmax())
            flat, weights = (
                w["generator.bank"][chosen] * shares[chosen],
                np.full(tokens, 1 / tokens),
            )
        case _:
            flat, weights = w["prompt.vectors"], np.empty(0)
    return flat.reshape(spec.prompt_length, spec.hidden_size), weights


@contextmanager
def _with_table(model: Any, tensors: dict[str, Tensor]) -> Iterator[None]:
    """DePT: a row of the table is added to the word embedding at each position."""
    if "prompt.table.a" not in tensors:
        yield
        return
    table = tensors["prompt.table.a"].double() @ tensors["prompt.table.b"].double()

    def add(_: nn.Module, __: Any, words: Tensor) -> Tensor:
        rows = [min(place, len(table) - 1) for place in range(words.shape[1])]
        return words + table[rows].float()

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def tokenize(
    model: Any, tokenizer: PreTrainedTokenizerFast, text: str, pair: str | None, *, max_length: int
) -> dict[str, Tensor]:
    """The model's keyword arguments for one text, by the tokenizer's own call."""
    kind = model.config.model_type
    if kind == "gpt2":
        extra = 1 if pair is None else 2
        cut: Any = tokenizer(text, pair, truncation="longest_first", max_length=max_length - extra)
        ids = list(cut["input_ids"])
        if pair is not None:
            first = cut.sequence_ids().count(0)
            ids.insert(first, tokenizer.eos_token_id)
        return {"input_ids": torch.tensor([[*ids, tokenizer.eos_token_id]])}
    encoded: Any = tokenizer(
        text, pair, truncation="longest_first", max_length=max_length, return_token_type_ids=True
    )
    inputs = {"input_ids": torch.tensor([encoded["input_ids"]])}
    if kind in ("bert", "electra"):
        inputs["token_type_ids"] = torch.tensor([encoded["token_type_ids"]])
    return inputs


def naive_prompt(
    tokens: Array, spec: AdapterSpec, tensors: dict[str, Tensor]
) -> tuple[Array, Array]:
    """Prompt [t, n] and column means [S] of the softmax, token by token as in the paper."""
    prompt = spec.prompt
    assert isinstance(prompt, AttentionPrompt)
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    values = [token @ w["generator.value"] for token in tokens]
    if prompt.pooling == "mean":
        attention = np.full((len(tokens), len(tokens)), 1 / len(tokens))
    else:
        queries = [token @ w["generator.query"] for token in tokens]
        keys = [token @ w["generator.key"] for token in tokens]
        attention = np.zeros((len(tokens), len(tokens)))
        for i, query in enumerate(queries):
            scores = np.array([query @ key / math.sqrt(prompt.attention_size) for key in keys])
            exponentials = np.exp(scores - scores.max())
            attention[i] = exponentials / exponentials.sum()
    attended = [sum(a * v for a, v in zip(row, values, strict=True)) for row in attention]
    pooled = np.mean(attended, axis=0)
    bottleneck = np.maximum(pooled @ w["generator.down.weight"] + w["generator.down.bias"], 0)
    flat = bottleneck @ w["generator.up.weight"] + w["generator.up.bias"]
    if prompt.final_activation == "relu":
        flat = np.maximum(flat, 0)
    elif prompt.final_activation == "tanh":
        flat = np.tanh(flat)
    return flat.reshape(prompt.length, spec.hidden_size), attention.mean(axis=0)


def layers_of(model: Any) -> nn.ModuleList:
    """The transformer layers of any supported family."""
    for path in ("encoder.layer", "transformer.layer", "h"):
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        assert isinstance(layers, nn.ModuleList)
        return layers
    raise AssertionError(f"no layers in {type(model).__name__}")


@contextmanager
def tuned(model: Any, spec: AdapterSpec, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Forward hooks that make a tuning's changes at every linear map, with gradients."""
    hooks = []
    if spec.tuning is not None:
        first, end = spec.tuning.layers
        for index, layer in enumerate(layers_of(model)[first:end]):
            for site, module in _linear_maps(layer).items():
                hooks += _hooks(module, site, spec.tuning, tensors, index)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear_maps(layer: Any) -> dict[str, nn.Module]:
    """The modules of a layer by site; `projection` is GPT-2's for queries, keys and values."""
    paths = {
        "query": ("attention.self.query", "attention.q_lin"),
        "key": ("attention.self.key", "attention.k_lin"),
        "value": ("attention.self.value", "attention.v_lin"),
        "projection": ("attn.c_attn",),
        "dense": ("attention.output.dense", "attention.out_lin", "attn.c_proj"),
        "up": ("intermediate.dense", "ffn.lin1", "mlp.c_fc"),
        "down": ("output.dense", "ffn.lin2", "mlp.c_proj"),
    }
    modules = dict(layer.named_modules())
    return {
        site: modules[path]
        for site, choices in paths.items()
        for path in choices
        if path in modules
    }


def _hooks(
    module: nn.Module,
    site: str,
    tuning: VectorTuning | LoraTuning,
    tensors: dict[str, Tensor],
    index: int,
) -> list[Any]:
    """index: of the layer among the tuned ones."""
    parts = ("query", "key", "value") if site == "projection" else (site,)

    def change(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = [
            _changed(part, args[0], chunk, tuning, tensors, index)
            for part, chunk in zip(parts, output.chunk(len(parts), dim=-1), strict=True)
        ]
        return torch.cat(changed, dim=-1)

    hooks: list[Any] = [module.register_forward_hook(change)]
    if site == "down" and "tuning.activated" in tensors:
        factor = 1 + tensors["tuning.activated"][index]
        hooks.append(module.register_forward_pre_hook(lambda _, args: (args[0] * factor,)))
    return hooks


def _changed(
    site: str,
    inputs: Tensor,
    output: Tensor,
    tuning: VectorTuning | LoraTuning,
    tensors: dict[str, Tensor],
    index: int,
) -> Tensor:
    if isinstance(tuning, LoraTuning):
        if site not in tuning.sites:
            return output
        a, b = tensors[f"tuning.{site}.a"][index], tensors[f"tuning.{site}.b"][index]
        return output + tuning.scaling * (inputs @ a) @ b
    scale, bias = tensors["tuning.scale"][index], tensors["tuning.bias"][index]
    n, f = len(bias) - len(scale), tuning.intermediate_size
    begin = {"query": 0, "key": n, "value": 2 * n, "dense": None, "up": 3 * n, "down": 3 * n + f}
    if (start := begin[site]) is None:
        return output
    end = start + output.shape[-1]
    if site != "down":
        output = output * (1 + scale[start:end])
    return output + bias[start:end]


def _states_below(model: Any, inputs: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """[S, n] each: the inputs of the first layer and of `layer`, in a pass without a prompt."""
    outputs = model(**inputs, output_hidden_states=True)
    return outputs.hidden_states[0][0], outputs.hidden_states[layer][0]


def _with_prompt(model: Any, inputs: dict[str, Tensor], layer: int, prompt: Tensor) -> Tensor:
    """[t + S, n]: the last layer's output with `prompt` in front of the input of `layer`."""
    layers = layers_of(model)
    causal = model.config.model_type == "gpt2"
    length = inputs["input_ids"].shape[1] + len(prompt)
    last: list[Tensor] = []

    def insert(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.cat([prompt[None], args[0]], dim=1), *args[1:]

    def see_everything_allowed(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The model made its mask for S positions; from here on there are t + S. One text in an
        # encoder needs none.
        future = torch.full((length, length), -math.inf).triu(1)[None, None]
        place = 2 if causal else 1
        return (*args[:place], future if causal else None, *args[place + 1 :]), kwargs

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        last.append(states[0])
        # GPT-2 reshapes its result to the ids' length.
        return states[:, len(prompt) :] if causal else None

    hooks = [layers[layer].register_forward_pre_hook(insert)]
    hooks += [
        above.register_forward_pre_hook(see_everything_allowed, with_kwargs=True)
        for above in layers[layer:]
    ]
    hooks.append((model.ln_f if causal else layers[-1]).register_forward_hook(keep))
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return last[0]


def _hidden(values: Array, activation: str) -> Array:
    match activation:
        case "tanh":
            return np.tanh(values)
        case "relu":
            return np.maximum(values, 0)
        case _:
            errors = np.array([math.erf(value / math.sqrt(2)) for value in values])
            return np.asarray(values * (1 + errors) / 2)


def _scores(read: Array, spec: AdapterSpec, tensors: dict[str, Tensor]) -> Array:
    w: dict[str, Array] = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    if spec.head.kind == "mlp":
        read = _hidden(read @ w["head.dense.weight"] + w["head.dense.bias"], spec.head.hidden)
    logits: Array = (
        read @ w["head.out.weight"] + w["head.out.bias"]
    ) / spec.calibration.temperature
    if spec.activation == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-logits)))
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())
