"""Deletion test: do the words that explanations name matter more to the answer than other words?

Of each text, the words that an explanation weighs highest are taken away, and the text is read
again. How much the score of its label falls is compared with taking away as many random words.
Needs texts: the test splits of the zoo's tasks.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.adapter import Classification, PreparedAdapter, classify, prepare, rows_of
from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from adapters.backbone.model import Backbone
from adapters.format.files import load_adapter
from adapters.tokenizer import Encoding, result_of
from adapters.words import Word
from benchmarks.arguments import at_least
from benchmarks.report import BenchmarkFailed, Report, progress
from benchmarks.shapes import described
from service.http.explanation import HIDDEN_WORDS, without
from train.data.dataset import read_examples

ZOO_FOLDER = Path(__file__).resolve().parent.parent / "adapters" / "zoo"
BATCH_TOKENS = 4096
# Words that are taken away at once.
COUNTS = (1, 3, 5)
# A shorter text has no words to choose from.
LEAST_WORDS = 8
RANDOM_DRAWS = 8
RESAMPLES = 10_000
# How occlusion hides one word while it measures; the service removes it.
KINDS = ("attention", "occlusion", "occlusion, masked")

Float = npt.NDArray[np.float64]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--data-root", type=Path, required=True, help="folder of the tasks' folders"
    )
    parser.add_argument(
        "--splits",
        default="sms-spam=sms_spam/test,banking77=banking77/test,sentiment=sst2/validation",
        metavar="NAME=FILE,...",
        help="adapters of the zoo and their texts, .jsonl.gz below --data-root; %(default)s",
    )
    parser.add_argument("--texts", type=at_least(2), default=300, help="for each adapter")
    parser.add_argument("--seed", type=at_least(0), default=0)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A text with the words that may be taken away."""

    text: str
    encoding: Encoding
    words: Sequence[Word]


class _Reader:
    """Scores texts by one adapter."""

    def __init__(self, backbone: Backbone, adapter: PreparedAdapter) -> None:
        self.backbone, self.adapter = backbone, adapter
        self.encoder = backbone.encoder
        # One token between [CLS] and [SEP].
        self.mask = int(self.encode("[MASK]").input_ids[1])

    def encode(self, text: str) -> Encoding:
        return self.encoder.encode(text, max_length=self.adapter.spec.max_length)

    def read(self, encodings: Sequence[Encoding]) -> list[Classification]:
        """In the order of the encodings, whatever their batches."""
        order = sorted(range(len(encodings)), key=lambda index: len(encodings[index]))
        found: list[Classification | None] = [None] * len(encodings)
        batch: list[int] = []
        for index in order:
            batch.append(index)
            full = len(encodings[index]) * (len(batch) + 1) > BATCH_TOKENS
            if full or index == order[-1]:
                rows = rows_of([self.adapter], [(0, encodings[each]) for each in batch])
                answers = classify(self.backbone, self.backbone.pack(rows), [self.adapter])
                for each, answer in zip(batch, answers, strict=True):
                    found[each] = answer
                batch = []
        return [answer for answer in found if answer is not None]

    def subjects(self, texts: Sequence[str]) -> list[_Subject]:
        subjects = []
        for text in texts:
            encoding = self.encode(text)
            fields = result_of(self.encoder.locate(text, max_length=self.adapter.spec.max_length))
            (words,) = self.encoder.words([text], fields, encoding)
            if LEAST_WORDS <= len(words) <= HIDDEN_WORDS and not encoding.truncated:
                subjects.append(_Subject(text, encoding, words))
        return subjects


def run(options: Namespace) -> Report:
    """Every adapter, every kind of explanation, every number of words."""
    backbone = load_backbone(device=options.device, dtype="float32")
    rows, figures = [], {}
    for pair in options.splits.split(","):
        name, _, place = pair.partition("=")
        path = options.data_root / f"{place}.jsonl.gz"
        if not path.exists():
            raise BenchmarkFailed(f"{path}: there is no such file")
        adapter = prepare(load_adapter(ZOO_FOLDER / f"{name}.safetensors"), backbone)
        reader = _Reader(backbone, adapter)
        subjects = reader.subjects([example.text for example in read_examples(str(path)).examples])
        subjects = subjects[: options.texts]
        progress(f"{name}: {len(subjects)} texts of {place}")
        figures[name] = result = _measure(reader, subjects, seed=options.seed)
        for way in ("deleted", "masked"):
            for count in COUNTS:
                cells = result[way][str(count)]
                rows.append(
                    [
                        f"{name}, {count} {way}",
                        f"{cells['random']['drop']:.3f}",
                        *(_cell(cells[kind]) for kind in KINDS),
                    ]
                )
    conditions = {
        "backbone": described(DEFAULT_BACKBONE),
        "texts": f"the first {options.texts} of {options.splits} with {LEAST_WORDS} to "
        f"{HIDDEN_WORDS} words",
        "figures": "mean fall of the label's score; in brackets by how much more than with random "
        f"words, and the 95 % interval of a paired bootstrap over texts ({RESAMPLES} resamples)",
        "random": f"mean of {RANDOM_DRAWS} draws, seed {options.seed}",
    }
    columns = ("adapter, words", "random", *KINDS)
    return Report("deletion test of explanations", columns, rows, figures, conditions)


def _cell(figure: dict[str, Any]) -> str:
    return (
        f"{figure['drop']:.3f} ({figure['more']:+.3f}, {figure['low']:+.3f}..{figure['high']:+.3f})"
    )


def _measure(reader: _Reader, subjects: Sequence[_Subject], *, seed: int) -> dict[str, Any]:
    answers = reader.read([subject.encoding for subject in subjects])
    best = np.array([answer.scores.argmax() for answer in answers])
    scores = np.array(
        [answer.scores[label] for answer, label in zip(answers, best, strict=True)], np.float64
    )
    orders: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        weights = (
            [
                np.array([sum(answer.token_weights[list(word.tokens)]) for word in subject.words])
                for subject, answer in zip(subjects, answers, strict=True)
            ]
            if kind == "attention"
            else _occlusion(reader, subjects, best, scores, masked=kind != "occlusion")
        )
        orders[kind] = [np.argsort(-each, kind="stable").tolist() for each in weights]
    generator = np.random.default_rng(seed)
    result: dict[str, Any] = {"texts": len(subjects), "label_score": float(scores.mean())}
    for way in ("deleted", "masked"):
        result[way] = {}
        for count in COUNTS:
            falls = {
                kind: scores - _without(reader, subjects, best, [o[:count] for o in order], way)
                for kind, order in orders.items()
            }
            draws = [
                scores
                - _without(
                    reader,
                    subjects,
                    best,
                    [generator.permutation(len(each.words))[:count].tolist() for each in subjects],
                    way,
                )
                for _ in range(RANDOM_DRAWS)
            ]
            falls["random"] = np.mean(draws, axis=0)
            result[way][str(count)] = {
                kind: _summary(fall, falls["random"], seed) for kind, fall in falls.items()
            }
    return result


def _occlusion(
    reader: _Reader, subjects: Sequence[_Subject], best: Any, scores: Float, *, masked: bool
) -> list[Float]:
    """As the service does it: one word after the other."""
    encodings = [
        _masked(reader, subject.encoding, [word]) if masked else without(subject.encoding, word)
        for subject in subjects
        for word in subject.words
    ]
    hidden = iter(reader.read(encodings))
    return [
        np.array([score - next(hidden).scores[label] for _ in subject.words])
        for subject, label, score in zip(subjects, best, scores, strict=True)
    ]


def _without(
    reader: _Reader,
    subjects: Sequence[_Subject],
    best: Any,
    chosen: Sequence[Sequence[int]],
    way: str,
) -> Float:
    """The scores of the labels if words are deleted from the texts, or masked."""
    encodings = []
    for subject, places in zip(subjects, chosen, strict=True):
        words = [subject.words[place] for place in places]
        if way == "masked":
            encodings.append(_masked(reader, subject.encoding, words))
            continue
        text = subject.text
        for word in sorted(words, reverse=True):
            text = text[: word.start] + text[word.end :]
        encodings.append(reader.encode(text))
    answers = reader.read(encodings)
    return np.array([answer.scores[label] for answer, label in zip(answers, best, strict=True)])


def _masked(reader: _Reader, encoding: Encoding, words: Sequence[Word]) -> Encoding:
    ids = encoding.input_ids.copy()
    ids[[token for word in words for token in word.tokens]] = reader.mask
    return Encoding(ids, encoding.token_type_ids, encoding.truncated)


def _summary(fall: Float, random: Float, seed: int) -> dict[str, float]:
    """The mean, and how much more it is than with random words, text by text."""
    more = fall - random
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(more), (RESAMPLES, len(more)))
    low, high = np.quantile(more[drawn].mean(axis=1), (0.025, 0.975))
    return {
        "drop": float(fall.mean()),
        "more": float(more.mean()),
        "low": float(low),
        "high": float(high),
    }
