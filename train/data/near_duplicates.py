"""Texts that are nearly the same: found among tens of thousands in seconds.

Two texts are near-duplicates if the sets of their normalised four-character pieces overlap by
`SIMILAR` (Jaccard), and so do those of their second texts. Pairs worth comparing come from MinHash
signatures in bands (Broder, 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets,
chapter 3). Signatures of all texts are computed together by numpy, so no Python runs for a piece;
the overlap of a candidate is then computed exactly.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from train.data.dataset import Text

# The share of the pieces of both texts that they must have in common. A changed word of five
# letters takes a text of 70 characters below it, so of short texts only misspelt copies count.
SIMILAR = 0.8
PIECE = 4

# A pair at `SIMILAR` shares a band with probability 0.9996, a pair at 0.2 with 0.006.
BANDS, BAND_ROWS = 20, 5
HASHES = BANDS * BAND_ROWS
# Signatures of a pair at `SIMILAR` agree in fewer places than this once in a million.
_AGREEMENT = 0.6
# In a band each text is compared with so many neighbours. Below this, all that share the band are.
_NEIGHBOURS = 32
# A pair of texts that both have so many near-duplicates already is not compared any more.
_ENOUGH = 4
# Pieces of one block, whose hashes stay in the processor's cache.
_BLOCK = 2**16
_PAIRS = 2**16

_Array: TypeAlias = NDArray[Any]
# Which of the pairs (first, second), given as int64 arrays, are of interest: bool array.
Relevant: TypeAlias = Callable[[_Array, _Array], _Array]


@dataclass(frozen=True, slots=True)
class NearPair:
    """Positions of two texts, the first one lower, and how similar they are: `SIMILAR` to 1."""

    first: int
    second: int
    similarity: float


class _Folding(dict[int, str | int]):
    """For `str.translate`: punctuation, spaces and control characters become a space."""

    def __missing__(self, code: int) -> str | int:
        folded = " " if unicodedata.category(chr(code))[0] in "PZC" else code
        self[code] = folded
        return folded


_FOLDING = _Folding()


def normalised(text: str) -> str:
    """Without case, punctuation and repeated spaces; a text of nothing else only loses its case.

    Symbols stay, because an emoji or a currency may be what a label depends on.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_FOLDING).split()) or folded.strip()


def near_duplicates(texts: Sequence[Text], relevant: Relevant) -> list[NearPair]:
    """Near-duplicates among normalised, distinct texts or pairs, in order of their positions.

    If very many texts resemble each other, some of their pairs are left out: each text is compared
    with its neighbours in `BANDS` random orders of them.
    """
    if len(texts) < 2:
        return []
    parts = [first for first, _ in texts]
    if texts[0][1] is not None:
        # Where many pairs share a text, as a passage with many questions, their other texts differ.
        parts = max(parts, [second or "" for _, second in texts], key=lambda each: len(set(each)))
    signatures = _signatures(parts)
    found: dict[tuple[int, int], float] = {}
    seen: set[tuple[int, int]] = set()
    partners = np.zeros(len(texts), dtype=np.int64)
    for first, second in _candidates(signatures):
        kept = relevant(first, second)
        kept &= (partners[first] < _ENOUGH) | (partners[second] < _ENOUGH)
        first, second = first[kept], second[kept]
        for pair in _alike(signatures, first, second):
            if pair in seen:
                continue
            seen.add(pair)
            similarity = _similarity(texts[pair[0]], texts[pair[1]])
            if similarity >= SIMILAR:
                found[pair] = similarity
                partners[list(pair)] += 1
    return [NearPair(*pair, similarity) for pair, similarity in sorted(found.items())]


def _signatures(texts: Sequence[str]) -> _Array:
    """MinHash of the pieces of every text: uint32 [texts, HASHES]."""
    random = np.random.default_rng(0)
    factors = random.integers(0, 2**32, size=HASHES, dtype=np.uint32) | np.uint32(1)
    signatures = np.empty((len(texts), HASHES), dtype=np.uint32)
    for start, end in _blocks(texts):
        pieces, spans = _piece_hashes(texts[start:end])
        product = np.empty_like(pieces)
        for index, factor in enumerate(factors):
            np.multiply(pieces, factor, out=product)
            signatures[start:end, index] = np.minimum.reduceat(product, spans)[::2]
    return signatures


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    start = total = 0
    for index, text in enumerate(texts):
        total += len(text) + PIECE
        if total >= _BLOCK:
            yield start, index + 1
            start, total = index + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _piece_hashes(texts: Sequence[str]) -> tuple[_Array, _Array]:
    """Hashes of pieces, uint32, and where each text's begin and end among them, int64 [2 * texts].

    Every text is followed by `PIECE` zeros, so even an empty one has a piece.
    """
    end = "\0" * PIECE
    codes = np.frombuffer((end.join(texts) + end).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.fromiter((len(text) + PIECE for text in texts), np.int64, len(texts))
    hashes = np.zeros(len(codes), dtype=np.uint64)
    padded = np.concatenate([codes, np.zeros(PIECE, np.uint32)]).astype(np.uint64)
    for offset in range(PIECE):
        hashes = hashes * np.uint64(0x100000001B3) + padded[offset : offset + len(codes)]
    # The last multiplication of splitmix64: every bit of the piece reaches the upper half.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    starts = np.cumsum(lengths) - lengths
    ends = starts + np.maximum(lengths - PIECE, 1)
    return (hashes >> np.uint64(32)).astype(np.uint32), np.stack([starts, ends], axis=1).ravel()


def _candidates(signatures: _Array) -> Iterator[tuple[_Array, _Array]]:
    """Pairs that share a band, in pieces: positions of their texts, the first one lower."""
    random = np.random.default_rng(0)
    weights = random.integers(0, 2**64, size=BAND_ROWS, dtype=np.uint64) | np.uint64(1)
    for band in range(BANDS):
        columns = signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS].astype(np.uint64)
        keys = (columns * weights).sum(axis=1, dtype=np.uint64)
        # A random order among equal keys, so that neighbours are of all splits.
        order = random.permutation(len(keys))
        order = order[np.argsort(keys[order], kind="stable")]
        keys = keys[order]
        for distance in range(1, min(_NEIGHBOURS, len(keys) - 1) + 1):
            same = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(same):
                break
            one, other = order[same], order[same + distance]
            yield np.minimum(one, other), np.maximum(one, other)


def _alike(signatures: _Array, first: _Array, second: _Array) -> Iterator[tuple[int, int]]:
    """Those pairs whose signatures agree often enough to compare their texts."""
    for start in range(0, len(first), _PAIRS):
        one, other = first[start : start + _PAIRS], second[start : start + _PAIRS]
        agreement = (signatures[one] == signatures[other]).mean(axis=1)
        kept = agreement >= _AGREEMENT
        yield from zip(one[kept].tolist(), other[kept].tolist(), strict=True)


def _similarity(one: Text, other: Text) -> float:
    """The lower one of the similarities of the first and of the second texts."""
    first = _overlap(one[0], other[0])
    if one[1] is None or other[1] is None or first < SIMILAR:
        return first
    return min(first, _overlap(one[1], other[1]))


def _overlap(one: str, other: str) -> float:
    if one == other:
        return 1.0
    ours, theirs = _pieces(one), _pieces(other)
    common = len(ours & theirs)
    return common / (len(ours) + len(theirs) - common)


@lru_cache(maxsize=4096)
def _pieces(text: str) -> frozenset[str]:
    padded = text + "\0" * PIECE
    return frozenset(padded[index : index + PIECE] for index in range(max(len(text), 1)))
