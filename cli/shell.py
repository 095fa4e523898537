"""The shell around every command: its parser, its one-line complaint, its exit code.

A mistake that the user can correct ends in one line on stderr and code 2, Ctrl-C in code 130. If
the reader of standard output closes the pipe, the code is 141 and nothing is printed.
"""

import codecs
import io
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


class CommandFailed(Exception):
    """A command cannot run or has to stop. The text says why, in one line."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command. help: its line in the list of commands. run: returns the exit code."""

    help: str
    run: Callable[[Namespace], int]
    add_arguments: Callable[[ArgumentParser], None] = lambda _: None


class _Parser(ArgumentParser):
    """Accepts no abbreviated flags, and raises CommandFailed where argparse prints its usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise CommandFailed(f"{message} (see {self.prog} --help)")


def parser_of(commands: Mapping[str, Command], *, prog: str, description: str) -> ArgumentParser:
    """The parser of a program; it stores the command's name as `command`."""
    parser = _Parser(prog=prog, description=description)
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        command.add_arguments(names.add_parser(name, help=command.help))
    return parser


def exit_code(
    work: Callable[[], int], *, explain: Callable[[Exception], str | None], prefix: str
) -> int:
    """Do the work of a command and return the process's exit code.

    Args:
        explain: the text for an error that the user can correct. "" prints nothing; None raises the
            error again, because it is a defect of the program.
        prefix: the complaint's first word.
    """
    escape_unencodable()
    try:
        code = work()
        # Flush here, where a closed pipe can still be told from other failures.
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more when it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        if message:
            sys.stderr.write(f"{prefix}: {one_line(message)}\n")
        return FAILED
    return code


def escape_unencodable() -> None:
    """Make standard output escape what its encoding lacks, as `\\u20ac`, instead of failing.

    The escapes are those of JSON, so JSON that is printed can still be parsed.
    """
    codecs.register_error("json_escape", _json_escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="json_escape")


def _json_escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    units = text.encode("utf-16-be", "surrogatepass")
    pairs = (units[index : index + 2] for index in range(0, len(units), 2))
    return "".join(f"\\u{pair.hex()}" for pair in pairs), error.end


def one_line(message: str) -> str:
    """The message as one line, with `?` for control characters: a terminal would obey them."""
    line = " ".join(message.split())
    return "".join(character if character.isprintable() else "?" for character in line)
