"""`python -m train COMMAND`: flags in, files and a closing table out.

Whatever the person at the terminal can put right ends in one line on stderr, `error: ...`, and code
2; Ctrl-C in code 130. torch is imported only once flags and files have been found usable.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from adapters.errors import AdapterError
from train.commands import Command, ablate, compare, evaluate, fit, push, transfer
from train.commands.flags import PROGRAM
from train.errors import TrainingError, UsageError
from train.loop.launch import Launch, is_first_to_fail

FAILED, INTERRUPTED = 2, 130

# In the order of the help.
COMMANDS: Mapping[str, Command] = {
    "fit": fit,
    "evaluate": evaluate,
    "push": push,
    "compare": compare,
    "transfer": transfer,
    "ablate": ablate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_text(given)
        arguments = _parser().parse_args(given)
        if arguments.command != "fit":
            Launch.of_environment().check_alone(arguments.command)
        return COMMANDS[arguments.command].run(arguments, given)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (TrainingError, AdapterError, OSError, MemoryError) as error:
        if is_first_to_fail():
            _complain(str(error) or type(error).__name__)
        return FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Make, measure and publish ID-SPAM adapters.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.HELP, allow_abbrev=False)
        command.add_arguments(added)
    return parser


def _check_text(given: Sequence[str]) -> None:
    """Adapter files, cards and reports name what they were made of, in UTF-8.

    Raises:
        UsageError: an argument that is no text.
    """
    for argument in given:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"not UTF-8: {argument}: rename it") from None


def _complain(message: str) -> None:
    """One line, whatever an error's text holds; control characters stay out of the terminal."""
    line = " ".join(message.split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    sys.stderr.write(f"error: {printable}\n")
