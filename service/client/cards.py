"""The model card that is sent with an adapter file: `x.md` beside `x.safetensors`, or another one.

A card is optional. One that only lies beside the file stops nothing: if it cannot be sent, a line
says so. One that was named is meant, so without it the command fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.client.errors import ClientError, InvalidCall, describe

SUFFIX = ".md"
# What a service keeps of a card.
MAX_CARD_BYTES = 2**18


@dataclass(frozen=True, slots=True)
class CardFile:
    """A card that can be sent. is_named: somebody asked for it, it did not just lie there."""

    path: Path
    text: str
    is_named: bool

    @property
    def shown(self) -> str:
        return f"model card {self.path} ({len(self.text):,} characters)"


def chosen_card(
    file: Path, *, named: Path | None, leave_out: bool, note: Callable[[str], None]
) -> CardFile | None:
    """The card to send with an adapter file.

    Args:
        named: in place of the one beside the file. leave_out: send none.
        note: called with a sentence if the one beside the file cannot be sent.

    Raises:
        InvalidCall: the named one cannot be sent.
    """
    if leave_out:
        return None
    if named is not None:
        return CardFile(named, _read(named), is_named=True)
    beside = file.with_suffix(SUFFIX)
    if beside == file or not beside.exists():
        return None
    try:
        return CardFile(beside, _read(beside), is_named=False)
    except InvalidCall as error:
        note(f"no model card is sent: {error}")
        return None


def send_card(card: CardFile, send: Callable[[str], object], note: Callable[[str], None]) -> None:
    """Send the card of an adapter that was published.

    Args:
        send: `Client.set_card` for that adapter and revision.
        note: called with what became of it.

    Raises:
        ClientError: the card was named, and is not stored.
    """
    try:
        send(card.text)
    except ClientError as error:
        if card.is_named:
            raise
        note(f"published without its {card.shown}: {describe(error)}")
    else:
        note(f"with its {card.shown}")


def _read(path: Path) -> str:
    """
    Raises:
        InvalidCall: no text that a service keeps.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CARD_BYTES + 1)
    except OSError as error:
        raise InvalidCall(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_CARD_BYTES:
        raise InvalidCall(f"{path}: a model card has at most {MAX_CARD_BYTES // 1024} KiB")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidCall(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
