"""A run's data sets as token ids and cached trunk states, shared by runs on the same data."""

from collections.abc import Mapping
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
    """The examples of one data set and their classes, as `classes_of` gives them."""

    cache: TrunkCache
    classes: Tensor


class EncodedSplits:
    """Encodes the data sets once, and computes trunk states again only where they change.

    Args:
        sets: by name, `train` among them.
        place: where the trunk states are kept.
    """

    def __init__(self, sets: Mapping[str, Dataset], backbone: Backbone, *, place: Place) -> None:
        self._sets = sets
        self._backbone = backbone
        self._place = place
        self._encodings: tuple[int, dict[str, list[Encoding]]] | None = None
        self._splits: tuple[object, dict[str, Split]] | None = None

    def splits(self, method: Method, progress: Progress) -> Mapping[str, Split]:
        """The data sets as `method` reads them; valid until the next call or `close`."""
        key = (method.shape, method.trunk_layers, method.design.max_length)
        if self._splits is None or self._splits[0] != key:
            self.close()
            splits = self._split_for(method)
            self._splits = key, splits
            try:
                if method.trunk_layers and self._place != "off":
                    _note_failures(splits, progress)
                    _fill(splits, progress)
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

    def _split_for(self, method: Method) -> dict[str, Split]:
        length = method.design.max_length
        if self._encodings is None or self._encodings[0] != length:
            encodings = {
                name: encode(self._backbone, data, length) for name, data in self._sets.items()
            }
            self._encodings = length, encodings
        labels = self._sets["train"].labels
        return {
            name: Split(
                TrunkCache(
                    self._backbone,
                    encodings,
                    method.shape,
                    trunk_layers=method.trunk_layers,
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
    """What is true of each example.

    int64 [examples], the index of its label among `labels`; or, where an example has a set of
    labels, float32 [examples, labels], 1 for those that it has.
    """
    index = {label: position for position, label in enumerate(labels)}
    if not data.multi_label:
        return torch.tensor([index[label] for example in data.examples for label in example.labels])
    classes = torch.zeros(len(data), len(labels))
    for row, example in enumerate(data.examples):
        classes[row, [index[label] for label in example.labels]] = 1
    return classes


def _note_failures(splits: Mapping[str, Split], progress: Progress) -> None:
    failures = {name: split.cache.failure for name, split in splits.items() if split.cache.failure}
    if failures:
        reasons = "; ".join(dict.fromkeys(failures.values()))
        progress.note(
            f"no room to keep the lower layers' states for {', '.join(failures)} ({reasons}): "
            "they are computed again in every epoch"
        )


def _fill(splits: Mapping[str, Split], progress: Progress) -> None:
    progress.begin("lower layers", texts=sum(len(split.cache) for split in splits.values()))
    for split in splits.values():
        for done in split.cache.fill():
            progress.advance(done)
