"""The sets of a run as encodings and kept lower layers, for runs that share them.

Knows no optimiser and no file but the cache's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.tokenizer import Encoding
from train.data.dataset import Dataset
from train.loop.progress import Progress
from train.loop.trunk_cache import Place, TrunkCache
from train.methods.method import Method


@dataclass(frozen=True, slots=True)
class Split:
    """Cached examples and their classes, int64 [examples]."""

    cache: TrunkCache
    classes: Tensor


class Kept:
    """Encodes the sets once, and computes the lower layers again only where they change.

    Args:
        place: where the states of the layers that are kept go.
    """

    def __init__(self, sets: Mapping[str, Dataset], backbone: Backbone, *, place: Place) -> None:
        self._sets = sets
        self._backbone = backbone
        self._place = place
        self._encodings: tuple[int, dict[str, list[Encoding]]] | None = None
        self._splits: tuple[object, dict[str, Split]] | None = None

    def splits(self, method: Method, progress: Progress) -> Mapping[str, Split]:
        """The sets as `method` reads them; they are good until the next call or `close`."""
        key = (method.shape, method.kept_layers, method.design.max_length)
        if self._splits is None or self._splits[0] != key:
            self.close()
            made = self._made(method)
            self._splits = key, made
            try:
                if method.kept_layers and self._place != "off":
                    _tell_of_lacking_room(made, progress)
                _fill(list(made.values()), progress)
            except BaseException:
                self.close()
                raise
        return self._splits[1]

    def close(self) -> None:
        """Free the memory or delete the files."""
        if self._splits is not None:
            for split in self._splits[1].values():
                split.cache.close()
        self._splits = None

    def _made(self, method: Method) -> dict[str, Split]:
        length = method.design.max_length
        if self._encodings is None or self._encodings[0] != length:
            found = {
                name: encode(self._backbone, some, length) for name, some in self._sets.items()
            }
            self._encodings = length, found
        labels = self._sets["train"].labels
        return {
            name: Split(
                TrunkCache(
                    self._backbone,
                    encodings,
                    method.shape,
                    kept_layers=method.kept_layers,
                    place=self._place,
                ),
                classes_of(self._sets[name], labels),
            )
            for name, encodings in self._encodings[1].items()
        }


def encode(backbone: Backbone, data: Dataset, max_length: int) -> list[Encoding]:
    """Token ids of every example, cut to `max_length`."""
    texts = [(example.text, example.text_pair) for example in data.examples]
    return backbone.encoder.encode_batch(texts, max_length=max_length)


def classes_of(data: Dataset, labels: tuple[str, ...]) -> Tensor:
    """int64 [examples]: where each label stands among `labels`."""
    index = {label: position for position, label in enumerate(labels)}
    return torch.tensor([index[example.label] for example in data.examples])


def _tell_of_lacking_room(splits: Mapping[str, Split], progress: Progress) -> None:
    lacking = {name: split.cache.failure for name, split in splits.items() if split.cache.failure}
    if lacking:
        reasons = "; ".join(dict.fromkeys(lacking.values()))
        progress.note(
            f"no room to keep the layers below for {', '.join(lacking)} ({reasons}): they are "
            "computed again in every epoch"
        )


def _fill(splits: Sequence[Split], progress: Progress) -> None:
    progress.begin("layers below", texts=sum(len(split.cache) for split in splits))
    for split in splits:
        for done in split.cache.fill():
            progress.advance(done)
