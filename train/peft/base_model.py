"""Which backbone belongs to a folder of PEFT: by its base model's name or weights."""

from pathlib import Path

from adapters.backbone.loading import DEFAULT_BACKBONE, DEFAULT_HUB_NAME, load_on_cpu
from adapters.backbone.model import Backbone
from train.peft.folder import PeftFolder


def backbone_name(folder: PeftFolder, given: str | None) -> str:
    """The backbone to load. given: what the user named, if anything.

    Raises:
        PeftError: nobody names one, or the folder's base model is a folder that is not here.
    """
    if given is not None:
        return given
    named = folder.base_model
    if named is None:
        raise folder.fault("names no base model; --backbone says on which it was trained")
    if named == DEFAULT_HUB_NAME:
        return DEFAULT_BACKBONE
    path = Path(named)
    if path.is_dir():
        return named
    if path.is_absolute() or named.startswith("."):
        raise folder.fault(
            f"its base model is {named}, which is not here; --backbone says where it is"
        )
    revision = folder.config.get("revision")
    return f"{named}@{revision}" if isinstance(revision, str) and revision else named


def check_base_model(folder: PeftFolder, backbone: Backbone) -> None:
    """Refuse a backbone that is not the folder's base model.

    A base model that is here as a folder is compared by its weights. Otherwise the last parts of
    the names must be equal: hub names are used with and without an owner, and folders are copied.

    Raises:
        PeftError: it is another one, or nothing shows that it is not.
    """
    named, loaded = folder.base_model, backbone.identity.name
    if named is None or named == loaded:
        return
    if Path(named).is_dir():
        if load_on_cpu(named).identity.fingerprint == backbone.identity.fingerprint:
            return
        raise folder.fault(f"trained on {named}, whose weights are not those of {loaded}")
    if _last(named) != _last(loaded):
        raise folder.fault(
            f"trained on {named!r}, the backbone is {loaded!r}; if that is the same model under "
            "another name, add --same-base-model"
        )


def _last(name: str) -> str:
    """`roberta-base` of `FacebookAI/roberta-base@main` and of `/models/roberta-base/`."""
    name = name if Path(name).is_dir() else name.partition("@")[0]
    return Path(name).name.casefold()
