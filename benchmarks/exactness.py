"""How batching and the type of computation change the scores of the zoo, on the tasks' test splits.

Without `--data-root` the texts are random words: then only the agreement means something. With it
the accuracy of every adapter in every type is measured, too.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.adapter import PreparedAdapter, classify, prepare, rows_of
from adapters.backbone.loading import (
    DEFAULT_BACKBONE,
    float8_lack,
    int8_lack,
    load_backbone,
    resolve_device,
)
from adapters.backbone.model import Backbone
from adapters.format.files import load_adapter
from adapters.tokenizer import Encoding
from benchmarks.arguments import at_least
from benchmarks.report import Report
from benchmarks.shapes import described
from benchmarks.texts import make_texts, words_of
from train.data.dataset import Example, read_examples
from train.zoo import ZOO

ZOO_FOLDER = Path(__file__).resolve().parent.parent / "adapters" / "zoo"
BATCH = 64


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-root", type=Path, help="folder of <task>/test.jsonl.gz")
    parser.add_argument("--texts", type=at_least(1), default=1000, help="for each adapter")


def run(options: Namespace) -> Report:
    """Compare mixed batches with each text alone, and other types with float32."""
    names = list(ZOO)
    examples = {name: _examples(name, options.data_root, options.texts) for name in names}
    texts = {name: [example.text for example in examples[name]] for name in names}
    types = ["float32", "bfloat16"]
    target = resolve_device(options.device)
    if target.type == "cpu" and int8_lack() is None:
        types.append("int8")
    if target.type == "cuda" and float8_lack(target) is None:
        types.append("float8")
    answers = {}
    accuracies: dict[str, dict[str, float]] = {}
    for dtype in types:
        backbone = load_backbone(device=options.device, dtype=dtype)
        adapters = [
            prepare(load_adapter(ZOO_FOLDER / f"{name}.safetensors"), backbone) for name in names
        ]
        inputs = [
            (index, backbone.encoder.encode(text, max_length=adapters[index].spec.max_length))
            for index, name in enumerate(names)
            for text in texts[name]
        ]
        order = np.random.default_rng(0).permutation(len(inputs))
        mixed = _run(backbone, adapters, [inputs[i] for i in order], BATCH)
        answers[dtype, "mixed"] = [mixed[i] for i in np.argsort(order)]
        answers[dtype, "alone"] = _run(backbone, adapters, inputs, 1)
        if options.data_root is not None:
            accuracies[dtype] = _accuracies(answers[dtype, "mixed"], adapters, examples)
    pairs = {
        f"{dtype}: mixed batch, alone": ((dtype, "mixed"), (dtype, "alone")) for dtype in types
    } | {
        f"{dtype}, float32: mixed batches": ((dtype, "mixed"), ("float32", "mixed"))
        for dtype in types[1:]
    }
    figures: dict[str, Any] = {
        title: _compare(answers[one], answers[other]) for title, (one, other) in pairs.items()
    }
    rows = [
        [
            title,
            f"{change['largest']:.1e}",
            f"{change['mean']:.1e}",
            f"{change['labels_changed']:.0f}",
            f"{change['largest_margin_lost']:.4f}",
        ]
        for title, change in figures.items()
    ]
    for name in names if accuracies else ():
        shown = ", ".join(f"{dtype} {accuracies[dtype][name]:.4f}" for dtype in types)
        rows.append([f"accuracy of {name}, {len(texts[name])} texts: {shown}", *[""] * 4])
    figures |= {"accuracy": accuracies} if accuracies else {}
    columns = ("compared", "largest change", "mean change", "labels changed", "largest margin lost")
    conditions = {
        "backbone": described(DEFAULT_BACKBONE),
        "device": options.device,
        "texts": f"{len(inputs)} over {len(names)} adapters, "
        + ("random words" if options.data_root is None else "of the tasks' test splits"),
        "batches": f"{BATCH} texts",
    }
    return Report("exactness of scores", columns, rows, figures, conditions)


def _examples(name: str, data_root: Path | None, count: int) -> list[Example]:
    if data_root is not None:
        split = read_examples(str(data_root / ZOO[name].folder / "test.jsonl.gz"))
        return list(split.examples[:count])
    texts = make_texts(
        words_of(DEFAULT_BACKBONE), count=count, mean_tokens=26, seed=list(ZOO).index(name)
    )
    return [Example(text, None, "") for text in texts]


def _accuracies(
    scores: Sequence[npt.NDArray[np.float32]],
    adapters: Sequence[PreparedAdapter],
    examples: Mapping[str, Sequence[Example]],
) -> dict[str, float]:
    """The share of right answers of each adapter; scores are in the order of the examples."""
    shares, start = {}, 0
    for adapter, (name, those) in zip(adapters, examples.items(), strict=True):
        labels = adapter.spec.labels
        right = [
            (labels[answer.argmax()],) == example.labels
            for answer, example in zip(scores[start : start + len(those)], those, strict=True)
        ]
        shares[name] = float(np.mean(right))
        start += len(those)
    return shares


def _run(
    backbone: Backbone,
    adapters: Sequence[PreparedAdapter],
    inputs: Sequence[tuple[int, Encoding]],
    size: int,
) -> list[npt.NDArray[np.float32]]:
    scores = []
    for start in range(0, len(inputs), size):
        batch = backbone.pack(rows_of(adapters, inputs[start : start + size]))
        scores += [answer.scores for answer in classify(backbone, batch, adapters)]
    return scores


def _compare(
    scores: Sequence[npt.NDArray[np.float32]], reference: Sequence[npt.NDArray[np.float32]]
) -> dict[str, float]:
    changes, lost = [], [0.0]
    for one, other in zip(scores, reference, strict=True):
        changes.append(float(np.abs(one - other).max()))
        if one.argmax() != other.argmax():
            second, best = np.sort(other)[-2:]
            lost.append(float(best - second))
    return {
        "largest": max(changes),
        "mean": float(np.mean(changes)),
        "labels_changed": len(lost) - 1,
        "largest_margin_lost": max(lost),
    }
