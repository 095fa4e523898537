"""The profile in an adapter's spec: how texts looked that it was not trained on.

Counts, not shares: how many texts there were decides how much chance is in them.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# A hostile file must not cost more than this.
MOST_EDGES = 32
MOST_LABELS = 4096
# Of a text: `max_length` of a spec.
MAX_TOKENS = 8192
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Where the rows come from: those held out of the training rows, the test rows, or rows that were
# given later (`python -m train profile`).
Source = Literal["validation", "test", "given"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Histogram(_Frozen):
    """How many texts lie between edges: counts[i] have edges[i-1] <= value < edges[i].

    The first bin has no lower end, the last one no upper end.
    """

    edges: tuple[float, ...] = Field(max_length=MOST_EDGES)
    counts: tuple[Count, ...] = Field(min_length=1, max_length=MOST_EDGES + 1)

    @model_validator(mode="after")
    def _edges_rise_between_the_bins(self) -> Self:
        if len(self.counts) != len(self.edges) + 1:
            raise ValueError(f"{len(self.counts)} counts for {len(self.edges)} edges")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("edges must rise")
        return self


class Profile(_Frozen):
    """What `rows` held-out texts were answered, and how they looked.

    version: of this object. labels: how many texts got each label, in the order of the spec.
    unlabelled: texts that got none, because the adapter abstained or their set of labels is empty.
    confidence: of the best label's score. length: in tokens that are read, special tokens included.
    unknown: the share of these tokens that stand for something the vocabulary lacks.
    """

    version: Annotated[int, Field(ge=1, le=1)] = 1
    source: Source
    rows: Annotated[int, Field(ge=1, le=2**31 - 1)]
    labels: tuple[Count, ...] = Field(min_length=1, max_length=MOST_LABELS)
    unlabelled: Count = 0
    confidence: Histogram
    length: Histogram
    unknown: Histogram

    @model_validator(mode="after")
    def _counts_are_of_these_rows(self) -> Self:
        for name, histogram, low, high in (
            ("confidence", self.confidence, 0.0, 1.0),
            ("length", self.length, 1.0, float(MAX_TOKENS)),
            ("unknown", self.unknown, 0.0, 1.0),
        ):
            if (total := sum(histogram.counts)) != self.rows:
                raise ValueError(f"{name} counts {total} texts, there are {self.rows} rows")
            if any(not low < edge <= high for edge in histogram.edges):
                raise ValueError(f"{name}: edges must be above {low:g} and at most {high:g}")
        if max(*self.labels, self.unlabelled) > self.rows:
            raise ValueError(f"more texts for a label than the {self.rows} rows")
        return self

    def fault(self, labels: int, *, several: bool) -> str | None:
        """Why it is not the profile of an adapter; None if it may be.

        Args:
            labels: how many labels the adapter has.
            several: whether a text may get several of them.
        """
        if len(self.labels) != labels:
            return f"profile counts {len(self.labels)} labels, there are {labels}"
        given = sum(self.labels) + self.unlabelled
        if given < self.rows or (given > self.rows and not several):
            return f"profile counts {given} labels of {self.rows} texts"
        return None
