"""The backbone that a benchmark of the engine runs, and what its tables say about it."""

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.adapter import random_adapter
from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from adapters.backbone.model import Backbone
from adapters.format.spec import AdapterSpec
from benchmarks.report import progress
from benchmarks.shapes import SHAPES, described, located
from benchmarks.texts import words_of

MEAN_TOKENS = 39.0


@dataclass(frozen=True, slots=True)
class Subject:
    """source: what `load_backbone` took. spec: that of all adapters that benchmarks make for it.

    words: one token each to its tokenizer.
    """

    source: str
    backbone: Backbone
    spec: AdapterSpec
    words: list[str]
    conditions: dict[str, Any]


def add_backbone_arguments(parser: ArgumentParser) -> None:
    """`--backbone`, `--device`, `--dtype`."""
    shapes = ", ".join(SHAPES)
    parser.add_argument(
        "--backbone",
        default=DEFAULT_BACKBONE,
        help=f"a folder, a name, or a shape that gets random weights: {shapes}",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")


@contextmanager
def subject(*, backbone: str, device: str, dtype: str) -> Iterator[Subject]:
    """Load it; a shape's files are gone in the end."""
    with TemporaryDirectory(prefix="idspam-shape-") as folder:
        source = located(backbone, Path(folder))
        progress(f"loading {described(backbone)}")
        loaded = load_backbone(source, device=device, dtype=dtype)
        conditions = {
            "backbone": described(backbone),
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        spec = random_adapter(loaded).spec
        yield Subject(source, loaded, spec, words_of(source), conditions)
