"""What `fit` chooses where a setting is left open. The measurements are in docs/defaults.md."""

from adapters.backbone import Backbone
from adapters.spec import AdapterSpec
from train.errors import SettingsError
from train.loop import Recipe
from train.settings import FitSettings

# Texts that a run goes through in all its epochs: small data gets many passes, large data few.
TEXTS_PER_RUN = 60_000
EPOCHS = (3, 20)
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
MAX_LENGTH = 256
# c of the paper: 34 fits its published parameter counts.
BOTTLENECK = 34


def recipe_of(settings: FitSettings, *, rows: int) -> Recipe:
    """The optimiser's settings for this many training rows."""
    least, most = EPOCHS
    epochs = settings.epochs or min(max(round(TEXTS_PER_RUN / rows), least), most)
    return Recipe(
        epochs=epochs,
        batch_size=settings.batch_size or BATCH_SIZE,
        learning_rate=settings.learning_rate or LEARNING_RATE,
        warmup_ratio=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        patience=settings.patience or max(3, epochs // 3),
        seed=settings.seed,
    )


def spec_of(settings: FitSettings, backbone: Backbone, labels: tuple[str, ...]) -> AdapterSpec:
    """The spec of an adapter of this backbone for these labels.

    Raises:
        SettingsError: a layer or length that this backbone does not have.
    """
    layer, length = settings.insertion_layer, settings.max_length
    faults = []
    if layer is not None and layer >= backbone.layers:
        faults.append(
            f"--insertion-layer {layer}: this backbone has layers 0..{backbone.layers - 1}"
        )
    if length is not None and length > backbone.max_tokens:
        faults.append(f"--max-length {length}: this backbone takes {backbone.max_tokens} tokens")
    if faults:
        raise SettingsError(faults)
    return AdapterSpec(
        backbone=backbone.identity,
        tokenizer_sha256=backbone.encoder.sha256,
        hidden_size=backbone.hidden_size,
        prompt_length=settings.prompt_length,
        bottleneck=settings.bottleneck or BOTTLENECK,
        attention_size=settings.attention_size or backbone.hidden_size,
        insertion_layer=backbone.layers // 2 if layer is None else layer,
        generator_input=settings.generator_input,
        generator_pooling=settings.generator_pooling,
        final_activation=settings.final_activation,
        pooling=settings.pooling,
        head=settings.head,
        labels=labels,
        max_length=length or min(MAX_LENGTH, backbone.max_tokens),
    )
