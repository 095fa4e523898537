"""Where an adapter's model card is, and how it is told from other files. Imports no torch."""

from pathlib import Path

# A line of the front matter of every card.
MARK = b'library_name: "id-spam"'
_FRONT_MATTER_BYTES = 2**16


def card_path(output: Path) -> Path:
    """The card of an adapter file: `x.safetensors` has `x.md` beside it."""
    return output.with_suffix(".md")


def is_card(path: Path) -> bool:
    """
    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        beginning = file.read(_FRONT_MATTER_BYTES)
    front, _, _ = beginning.removeprefix(b"---\n").partition(b"\n---\n")
    return beginning.startswith(b"---\n") and MARK in front.splitlines()
