"""Where an adapter's model card is, how it is told from other files, and how it follows its file.

Imports no torch.
"""

import hashlib
from pathlib import Path

from adapters.format.durable import write_atomically

# A line of the front matter of every card.
MARK = b'library_name: "id-spam"'
_FRONT_MATTER_BYTES = 2**16


def card_path(output: Path) -> Path:
    """The card of an adapter file: `x.safetensors` has `x.md` beside it."""
    return output.with_suffix(".md")


def renew_card(output: Path, before: bytes) -> None:
    """Have the card of an adapter file, if it has one, name the bytes that the file has now.

    Args:
        before: its bytes when the card was written.

    Raises:
        OSError: one of them cannot be read or written.
    """
    path = card_path(output)
    if not path.is_file() or not is_card(path):
        return
    card, after = path.read_bytes(), output.read_bytes()
    for old, new in (
        (_revision(before), _revision(after)),
        (f"| bytes | {len(before)} |", f"| bytes | {len(after)} |"),
    ):
        card = card.replace(old.encode(), new.encode())
    write_atomically(path, card)


def _revision(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_card(path: Path) -> bool:
    """
    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        beginning = file.read(_FRONT_MATTER_BYTES)
    front, _, _ = beginning.removeprefix(b"---\n").partition(b"\n---\n")
    return beginning.startswith(b"---\n") and MARK in front.splitlines()
