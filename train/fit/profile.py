"""`profile`: write into an adapter file how texts look that it was not trained on."""

from dataclasses import replace
from pathlib import Path

from adapters.adapter import prepare
from adapters.format.files import load_adapter, save_adapter
from adapters.format.profile import Profile, Source
from adapters.profiles import profile_of
from train.config.defaults import load_backbone_on
from train.config.settings import ComputeType
from train.data.dataset import Dataset, check_label_kind
from train.loop.encoded_splits import encode
from train.loop.progress import Progress
from train.report.card_file import renew_card
from train.report.evaluation import served_scores


def add_profile(
    adapter: Path,
    data: Dataset,
    output: Path,
    *,
    backbone: str | None,
    device: str,
    dtype: ComputeType | None,
    progress: Progress,
    source: Source = "given",
) -> Profile:
    """Answer texts with an adapter file, by the code that serves it, and write the file again with
    their profile. Nothing else of it changes, but its revision does, which its model card names.

    Args:
        data: rows that it was not trained on; their labels are not used.
        output: may be `adapter` itself.
        backbone: None takes the one that the adapter names.
        dtype: None means float32 on a CPU and `auto` on a GPU.
        source: what the rows are.

    Raises:
        InvalidAdapter, IncompatibleAdapter: the file is unusable, or for another backbone.
        DataError: rows of another kind of task.
        OSError: a file cannot be read or written.
    """
    before = adapter.read_bytes()
    loaded = load_adapter(adapter)
    spec = loaded.spec
    check_label_kind(data, multi_label=spec.multi_label, known_to="the adapter")
    model = load_backbone_on(backbone or spec.backbone.name, device=device, dtype=dtype)
    encodings = encode(model, data, spec.max_length)
    scores = served_scores(prepare(loaded, model), model, encodings, progress).numpy()
    profile = profile_of(
        spec,
        zip(scores, (encoding.input_ids for encoding in encodings), strict=True),
        unknown_id=model.encoder.unknown_id,
        source=source,
    )
    updated = spec.model_copy(update={"profile": profile})
    save_adapter(output, replace(loaded, spec=updated))
    if output.samefile(adapter):
        renew_card(output, before)
    return profile
