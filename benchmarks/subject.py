"""The backbone that a benchmark of the engine runs, and how its tables describe it."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone, random_adapter
from adapters.format.spec import AdapterSpec
from benchmarks.report import progress
from benchmarks.shapes import described, located
from benchmarks.texts import words_of

MEAN_TOKENS = 39.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded backbone.

    source: where it was loaded from. spec: the one that all adapters made for it share. words: its
    tokenizer has one token for each. conditions: lines for the table.
    """

    source: str
    backbone: Backbone
    spec: AdapterSpec
    words: list[str]
    conditions: dict[str, Any]


@contextmanager
def loaded_subject(options: Namespace) -> Iterator[Subject]:
    """Load what `--backbone`, `--device` and `--dtype` name; a shape's files are removed after."""
    with TemporaryDirectory(prefix="idspam-shape-") as folder:
        source = located(options.backbone, Path(folder))
        progress(f"loading {described(options.backbone)}")
        backbone = load_backbone(source, device=options.device, dtype=options.dtype)
        conditions = {
            "backbone": described(options.backbone),
            "device": str(backbone.device),
            "dtype": backbone.computes,
        }
        spec = random_adapter(backbone).spec
        yield Subject(source, backbone, spec, words_of(source), conditions)
