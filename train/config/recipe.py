"""The recipe of a run: how long, how fast and towards which metric a method is trained.

What the settings leave open is chosen here. The measurements are in docs/defaults.md.
"""

from dataclasses import dataclass

from train.config.defaults import choices_of
from train.config.settings import FitSettings
from train.data.dataset import Dataset
from train.methods import METHODS
from train.metrics import Metric

# Texts that a run sees in all its epochs: small data gets many passes, large data few.
TEXTS_PER_RUN = 60_000
EPOCHS = (3, 12)
# Texts in a step, for data with few rows and with many.
BATCH_SIZES = (32, 64)
MANY_ROWS = 10_000
# From this number of classes on, every row teaches much.
MANY_LABELS = 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the training loop needs of the settings, nothing left open.

    batch_size: texts in a step. micro_batch: texts whose gradients are computed at once. metric:
    decides which epoch is the best. tuning_rate: the learning rate of the changes to the layers;
    None: the same.
    """

    epochs: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    patience: int
    seed: int
    metric: Metric
    tuning_rate: float | None = None


def recipe_of(method: str, settings: FitSettings, train: Dataset, metric: Metric) -> Recipe:
    """The recipe of a method on these training rows.

    Args:
        settings: as `settings_for` has them for the method.
    """
    preset, own = choices_of(method, settings), METHODS[method]
    many_labels = len(train.labels) >= MANY_LABELS
    default_rate = _first(own.learning_rate, preset.learning_rate)
    default_tuning_rate = own.tuning_rate
    if many_labels and own.many_labels_rates is not None:
        default_rate, default_tuning_rate = own.many_labels_rates
    rate, tuning_rate = _first(settings.learning_rate, default_rate), settings.tuning_rate
    if tuning_rate is None and default_tuning_rate is not None:
        # A rate that is given scales both.
        tuning_rate = default_tuning_rate * rate / default_rate
    least, most = EPOCHS
    epochs = settings.epochs or min(max(round(TEXTS_PER_RUN / len(train)), least), most)
    many_rows = len(train) >= MANY_ROWS
    # A row with a set of labels teaches a decision about each of them.
    many = many_rows or many_labels or train.multi_label
    batch_size = settings.batch_size or BATCH_SIZES[many_rows]
    return Recipe(
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=settings.micro_batch or batch_size,
        learning_rate=rate,
        warmup_ratio=settings.warmup_ratio,
        weight_decay=_first(settings.weight_decay, own.weight_decay, preset.weight_decay[many]),
        patience=settings.patience or max(3, epochs // 3),
        seed=settings.seed,
        metric=metric,
        tuning_rate=tuning_rate,
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
