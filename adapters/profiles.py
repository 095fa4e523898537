"""Counts texts by label, confidence, length and unknown tokens: in training and while serving.

Both count with `Bins`, so what they count can be compared.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from adapters.format.profile import MAX_TOKENS, Histogram, Profile, Source
from adapters.format.spec import AdapterSpec

Quantity: TypeAlias = Literal["label", "confidence", "length", "unknown"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
Scores: TypeAlias = npt.NDArray[np.float32]
Ids: TypeAlias = npt.NDArray[np.int64]

# Wider than what another type of the device's numbers moves a score by.
CONFIDENCE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# The first one is below the share of one token in a long text.
UNKNOWN_EDGES = (0.0001, 0.02, 0.05, 0.1, 0.2)
_LENGTH_BINS = 10


class Bins:
    """Where a text is counted: the bins of all quantities, one after the other.

    label has a bin for each label, and one more for texts that get none.

    Args:
        confidence, length, unknown: the edges of their histograms.
        unknown_id: the token that stands for what the vocabulary lacks; None: there is none.
    """

    __slots__ = ("_below", "_edges", "_labels", "_thresholds", "_unknown_id", "starts")

    def __init__(
        self,
        spec: AdapterSpec,
        *,
        confidence: Sequence[float],
        length: Sequence[float],
        unknown: Sequence[float],
        unknown_id: int | None,
    ) -> None:
        self._labels = len(spec.labels)
        self._edges = tuple(confidence), tuple(length), tuple(unknown)
        self._unknown_id = unknown_id
        self._below = spec.abstain_below or 0.0
        self._thresholds = np.array(spec.label_thresholds) if spec.multi_label else None
        starts = [0, self._labels + 1]
        for edges in self._edges:
            starts.append(starts[-1] + len(edges) + 1)
        # Where each quantity begins, and the number of all bins.
        self.starts = tuple(starts)

    @classmethod
    def of_profile(cls, spec: AdapterSpec, profile: Profile, unknown_id: int | None) -> "Bins":
        """The bins of the profile in an adapter's file."""
        return cls(
            spec,
            confidence=profile.confidence.edges,
            length=profile.length.edges,
            unknown=profile.unknown.edges,
            unknown_id=unknown_id,
        )

    def of_text(self, scores: Scores, input_ids: Ids) -> list[int]:
        """The bins of one text: of its label or labels, then one for each other quantity.

        Args:
            scores: [labels], as they are served.
            input_ids: [tokens] that were read.
        """
        best = int(scores.argmax())
        confidence, tokens = float(scores[best]), len(input_ids)
        if self._thresholds is not None:
            bins = np.flatnonzero(scores >= self._thresholds).tolist() or [self._labels]
        else:
            bins = [best if confidence >= self._below else self._labels]
        unknown = 0.0
        if self._unknown_id is not None:
            unknown = np.count_nonzero(input_ids == self._unknown_id) / tokens
        _, first, second, third, _ = self.starts
        confidences, lengths, shares = self._edges
        bins.append(first + bisect_right(confidences, confidence))
        bins.append(second + bisect_right(lengths, tokens))
        bins.append(third + bisect_right(shares, unknown))
        return bins


def profile_of(
    spec: AdapterSpec,
    texts: Iterable[tuple[Scores, Ids]],
    *,
    unknown_id: int | None,
    source: Source,
) -> Profile:
    """The profile of texts that the adapter was not trained on.

    Args:
        texts: at least one; of each the scores, [labels], and the tokens that were read.
    """
    rows = list(texts)
    lengths = length_edges([len(input_ids) for _, input_ids in rows])
    bins = Bins(
        spec,
        confidence=CONFIDENCE_EDGES,
        length=lengths,
        unknown=UNKNOWN_EDGES,
        unknown_id=unknown_id,
    )
    counts = [0] * bins.starts[-1]
    for scores, input_ids in rows:
        for at in bins.of_text(scores, input_ids):
            counts[at] += 1
    label, confidence, length, unknown, end = bins.starts
    return Profile(
        source=source,
        rows=len(rows),
        labels=tuple(counts[label : confidence - 1]),
        unlabelled=counts[confidence - 1],
        confidence=Histogram(edges=CONFIDENCE_EDGES, counts=tuple(counts[confidence:length])),
        length=Histogram(edges=lengths, counts=tuple(counts[length:unknown])),
        unknown=Histogram(edges=UNKNOWN_EDGES, counts=tuple(counts[unknown:end])),
    )


def counts_of(profile: Profile) -> dict[Quantity, tuple[int, ...]]:
    """The counts of a profile, in the order of `Bins`."""
    return {
        "label": (*profile.labels, profile.unlabelled),
        "confidence": profile.confidence.counts,
        "length": profile.length.counts,
        "unknown": profile.unknown.counts,
    }


def length_edges(lengths: Sequence[int]) -> tuple[float, ...]:
    """Whole numbers that divide the lengths into at most ten bins, as equal as they can be; and
    one more bin on either side, for texts that are shorter or longer than all of these."""
    ordered = sorted(lengths)
    cuts = {ordered[len(ordered) * part // _LENGTH_BINS] for part in range(_LENGTH_BINS)}
    cuts.add(ordered[-1] + 1)
    return tuple(float(cut) for cut in sorted(cuts) if 1 < cut <= MAX_TOKENS)
