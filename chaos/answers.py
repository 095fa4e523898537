"""What is right: adapters that are told apart by their answers, and the answers themselves.

The reference is computed in this process, one text at a time in float32, by
`adapters.adapter.classify`; the tests hold that to a plain Hugging Face model
(docs/exactness.md). So it shares nothing with the service's batches, slots and caches.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adapters.adapter import PreparedAdapter, classify, prepare
from adapters.backbone.model import Backbone, random_adapter
from adapters.format.files import Adapter, serialize
from adapters.packed.packing import Row, RowShape
from service.client import Input
from service.commands.demo import Mixture

# The bounds of docs/exactness.md on every score: batch-mates change float32 sums only in their
# order, and bfloat16 rounds.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05}


@dataclass(slots=True)
class Version:
    """One version of an adapter: its file, its revision and what computes its answers."""

    file: bytes
    revision: str
    adapter: Adapter
    prepared: PreparedAdapter | None = None
    scores: dict[int, dict[str, float]] = field(default_factory=dict)


class Answers:
    """Makes versions and texts, and judges answers.

    Args:
        backbone: in float32 on the CPU.
        dtype: what the service computes in.
        seed: of texts and adapters.
    """

    def __init__(self, backbone: Backbone, *, dtype: str, seed: int, texts: int) -> None:
        # Several threads would wait for each other while the service has the processors.
        torch.set_num_threads(1)
        self._backbone = backbone
        self._tolerance = TOLERANCES[dtype]
        self._seeds = iter(range(seed * 1_000_000 + 1, (seed + 1) * 1_000_000))
        self.texts = _texts(seed, texts)
        self._versions: dict[str, Version] = {}
        # By name: the last version that was made for it.
        self._replaced: dict[str, str] = {}
        self.judged = 0

    def version(self, *, replaces: str | None = None) -> Version:
        """A new version: another revision, and clearly other scores for every text.

        Args:
            replaces: a name whose version before this one may be forgotten.
        """
        seed = next(self._seeds)
        adapter = random_adapter(self._backbone, seed=seed)
        # Wide enough that versions and texts differ by far more than the tolerance.
        adapter = Adapter(
            adapter.spec, {name: tensor * 2.0 for name, tensor in adapter.tensors.items()}
        )
        file = serialize(adapter)
        version = Version(file, hashlib.sha256(file).hexdigest(), adapter)
        self._versions[version.revision] = version
        if replaces is not None:
            self._versions.pop(self._replaced.get(replaces, ""), None)
            self._replaced[replaces] = version.revision
        return version

    def learn(self, version: Version) -> None:
        """Compute a version's answers to all texts now: later they are compared without delay."""
        for text in range(len(self.texts)):
            self._scores(version, text)

    def fault_of(self, texts: Sequence[int], results: Any) -> str | None:
        """What is wrong with the results of a predict request for these texts; None: nothing."""
        if not isinstance(results, list) or len(results) != len(texts):
            return f"{len(texts)} texts, but the results are {str(results)[:200]}"
        for text, result in zip(texts, results, strict=True):
            version = self._versions.get(result["revision"])
            if version is None:
                return f"an unknown revision: {result['revision']}"
            expected = self._scores(version, text)
            got = {item["label"]: item["score"] for item in result["scores"]}
            self.judged += 1
            if got.keys() != expected.keys():
                return f"labels {sorted(got)} of revision {version.revision[:8]}"
            worst = max(abs(got[label] - expected[label]) for label in expected)
            if not worst <= self._tolerance:
                return f"text {text} of revision {version.revision[:8]} is off by {worst:.2g}"
        return None

    def body(self, name: str, texts: Sequence[int]) -> dict[str, Any]:
        """A predict request for these texts."""
        inputs = []
        for number in texts:
            text = self.texts[number]
            pair = {} if text.text_pair is None else {"text_pair": text.text_pair}
            inputs.append({"text": text.text, **pair})
        return {"adapter": name, "inputs": inputs}

    @torch.inference_mode()
    def _scores(self, version: Version, number: int) -> dict[str, float]:
        if number not in version.scores:
            if version.prepared is None:
                version.prepared = prepare(version.adapter, self._backbone)
            text, spec = self.texts[number], version.adapter.spec
            encoding = self._backbone.encoder.encode(
                text.text, text.text_pair, max_length=spec.max_length
            )
            batch = self._backbone.pack([Row(encoding, RowShape.of(spec), 0)])
            (row,) = classify(self._backbone, batch, [version.prepared])
            version.scores[number] = dict(zip(spec.labels, row.scores.tolist(), strict=True))
        return version.scores[number]


def _texts(seed: int, count: int) -> list[Input]:
    """Texts as the demo sends them: sentences, pairs, and a few that are cut."""
    mixture = Mixture(["x"], random.Random(seed))
    texts: list[Input] = [Input("x", adapter="x"), mixture.long_input()]
    while len(texts) < count:
        texts.extend(mixture.inputs())
    return texts[:count]
