"""One method on one task, from data sets to trained weights: what every command stands on.

    data -> Kept (encodings, TrunkCache) -> Loop -> logits of every split

Knows no command line and no adapter file.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from train.config.defaults import design_of
from train.config.recipe import Recipe, recipe_of
from train.config.settings import FitSettings
from train.data.dataset import Dataset, check_same_task, check_trainable
from train.loop.distributed import Alone, Team
from train.loop.encoded_splits import Kept, Split
from train.loop.loop import Loop
from train.loop.progress import Progress
from train.methods import METHODS, build
from train.methods.method import Design, Method
from train.metrics import Metric, Metrics, measure


@dataclass(frozen=True, slots=True)
class Training:
    """A run that is set up. splits: by name, `train` among them; seconds: what `Kept` took."""

    backbone: Backbone
    method: Method
    design: Design
    recipe: Recipe
    labels: tuple[str, ...]
    loop: Loop
    team: Team
    kept: Kept
    splits: Mapping[str, Split]
    seconds: float

    def logits(self) -> dict[str, Tensor]:
        """Logits of every split but the training rows, float32 [rows, labels] on the CPU."""
        return {
            name: self.loop.logits(split) for name, split in self.splits.items() if name != "train"
        }

    @property
    def classes(self) -> dict[str, Tensor]:
        """True classes of every split, int64 [rows]."""
        return {name: split.classes for name, split in self.splits.items()}

    def close(self) -> None:
        """Free what was kept of the lower layers."""
        self.kept.close()


def set_up(
    method: str,
    sets: Mapping[str, Dataset],
    settings: FitSettings,
    backbone: Backbone,
    *,
    judge: str,
    metric: Metric,
    state_file: Path,
    progress: Progress,
    team: Team | None = None,
    kept: Kept | None = None,
    starts_from: str = "",
) -> Training:
    """Encode the data, fill the cache, build the method; resumes where the settings say so.

    Args:
        sets: `train`, and what is measured.
        judge: which of the sets decides on the best epoch; without it the last one is taken.
        kept: of these sets, where several runs share it.
        starts_from: names what the caller will put in place of the initial weights, if anything.

    Raises:
        TrainingError: unusable data or settings, no state to resume.
    """
    train = sets["train"]
    check_trainable(train)
    for name, found in sets.items():
        if name != "train":
            check_same_task(train, found)
    design, labels = design_of(settings, backbone), train.labels
    random = torch.Generator().manual_seed(settings.seed)
    built = build(method, backbone, design, labels, random).to(backbone.device)
    recipe = recipe_of(method, settings, train, metric)
    started = time.perf_counter()
    kept = kept or Kept(sets, backbone, place=settings.cache.value)
    splits = kept.splits(built, progress)
    team = team or Alone()
    seconds = time.perf_counter() - started
    loop = Loop(
        built,
        recipe,
        train=splits["train"],
        validation=splits.get(judge),
        state_file=state_file,
        run=_identity(method, sets, backbone, design, recipe, starts_from),
        team=team,
    )
    if settings.resume:
        loop.resume()
    return Training(backbone, built, design, recipe, labels, loop, team, kept, splits, seconds)


def measured(logits: Mapping[str, Tensor], classes: Mapping[str, Tensor]) -> dict[str, Metrics]:
    """Figures of every split that has logits."""
    return {
        name: measure(made.argmax(dim=-1), classes[name], labels=made.shape[1])
        for name, made in logits.items()
    }


def _identity(
    method: str,
    sets: Mapping[str, Dataset],
    backbone: Backbone,
    design: Design,
    recipe: Recipe,
    starts_from: str,
) -> str:
    """What decides how a run goes on: another run's state is refused."""
    assert method in METHODS
    parts = {
        "method": method,
        "backbone": backbone.identity.fingerprint,
        "data": {name: [found.sha256, len(found)] for name, found in sets.items()},
        "design": asdict(design),
        "recipe": asdict(recipe),
        "starts_from": starts_from,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
