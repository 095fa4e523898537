"""`python -m service COMMAND`: what is typed, to a command and its exit code.

Whatever the person at the terminal can put right ends in one line on stderr, `service: ...`, and
code 2; Ctrl-C in 130; a reader that closes the pipe in 141, without a word.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from service.commands import Command, CommandFailed, adapters, demo, metrics, predict, top
from service.commands import tables as settings
from service.commands.flags import words_of

PROGRAM = "python -m service"
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141

# In the order of the help.
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "predict": predict,
        "adapters": adapters,
        "top": top,
        "demo": demo,
        "settings": settings,
        "metrics": metrics,
    }
)


def main(given: Sequence[str]) -> int:
    """Run one command and return the process's exit code."""
    try:
        arguments = _parser().parse_args(given)
        code = COMMANDS[arguments.command].run(arguments)
        # Here a closed pipe can still be told from other failures.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # What is buffered has nowhere to go; the interpreter would say so at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (CommandFailed, OSError) as error:
        _complain(str(error))
    except Exception as error:
        from service.client import ClientError

        if not isinstance(error, ClientError):
            raise
        _complain(words_of(error))
    return FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandFailed(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Without a command: serve, as the environment's IDSPAM_* say. With one:",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.HELP, allow_abbrev=False)
        command.add_arguments(added)
    return parser


def _complain(message: str) -> None:
    """One line, whatever an error's text holds; control characters stay out of the terminal."""
    line = " ".join(message.split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    sys.stderr.write(f"service: {printable}\n")
