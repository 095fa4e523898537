"""Flags that commands of both programs have."""

from argparse import ArgumentParser
from pathlib import Path


def add_card(parser: ArgumentParser, *, file: str) -> None:
    """`--card X.md` and `--no-card`, of a command that sends an adapter file.

    Args:
        file: what the command's help calls that file.
    """
    card = parser.add_mutually_exclusive_group()
    card.add_argument(
        "--card",
        type=Path,
        metavar="X.md",
        help=f"the model card to keep with it; default: the one beside {file}, if there is one",
    )
    card.add_argument("--no-card", action="store_true", help="send no model card")
