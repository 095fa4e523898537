"""The model card as a file beside its adapter: whether it may be written there, and writing it.

Measures nothing.
"""

import hashlib
import os
import platform
from pathlib import Path

import torch

from adapters.durable import write_atomically
from adapters.spec import AdapterSpec
from train.card import CardFacts, card_path, model_card
from train.errors import OutputError
from train.report import FitReport, versions

# A line of the front matter of every card that was written here.
_MARK = b'library_name: "id-spam"'
_FRONT_MATTER_BYTES = 2**16


def check_card(output: Path) -> None:
    """
    Raises:
        OutputError: the card would take the place of something that is not a card.
    """
    path = card_path(output)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, but the model card of {output} goes there")
    if path.exists() and not _is_card(path):
        raise OutputError(
            f"{path}: is no model card and would be replaced by that of {output}: "
            "rename one of the two"
        )


def write_card(
    output: Path, report: FitReport, spec: AdapterSpec, *, device: torch.device, paired: bool
) -> None:
    """Write the card of the adapter file that lies at `output`."""
    data = output.read_bytes()
    facts = CardFacts(
        report=report,
        spec=spec,
        assessments=report.assessments,
        file_name=output.name,
        file_size=len(data),
        revision=hashlib.sha256(data).hexdigest(),
        machine=_machine(device),
        versions=versions(),
        paired=paired,
    )
    write_atomically(card_path(output), model_card(facts).encode())


def _is_card(path: Path) -> bool:
    with path.open("rb") as file:
        beginning = file.read(_FRONT_MATTER_BYTES)
    front, _, _ = beginning.removeprefix(b"---\n").partition(b"\n---\n")
    return beginning.startswith(b"---\n") and _MARK in front.splitlines()


def _machine(device: torch.device) -> str:
    """In words."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPU cores ({_processor()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
