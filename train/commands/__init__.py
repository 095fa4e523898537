"""The commands of `python -m train`, one module each: `HELP`, `add_arguments` and `run`.

A module imports torch in `run` at the earliest: flags and files are found unusable without it.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Protocol


class Command(Protocol):
    """What a module of this package is."""

    @property
    def HELP(self) -> str:  # noqa: N802  # a module's constant
        """One line, for the list of commands."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the flags."""

    def run(self, arguments: Namespace, given: Sequence[str]) -> int:
        """
        Args:
            given: the command line as it was typed, the command's name first.

        Returns:
            the process's exit code.

        Raises:
            TrainingError, AdapterError, OSError: what the person at the terminal can put right.
        """
