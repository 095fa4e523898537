"""The commands of `python -m service`, one module each: `HELP`, `add_arguments` and `run`.

They are clients of a running service, by `service.client`, or print tables. What takes long to
import is imported in `run`: serving goes through none of it.
"""

from argparse import ArgumentParser, Namespace
from typing import Protocol


class Command(Protocol):
    """What a module of this package is."""

    @property
    def HELP(self) -> str:  # noqa: N802  # a module's constant
        """One line, for the list of commands."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the flags."""

    def run(self, arguments: Namespace) -> int:
        """
        Returns:
            the process's exit code.

        Raises:
            CommandFailed, ClientError, OSError: what the person at the terminal can put right.
        """


class CommandFailed(Exception):
    """The command cannot be run like this, or ends here; the message is the one line that says
    why."""
