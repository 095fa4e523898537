"""The shell around every command: its parser, its one-line complaint, its exit code.

A mistake that the user can correct ends in one line on stderr and code 2, Ctrl-C in code 130. If
the reader of standard output closes the pipe, the code is 141 and nothing is printed. A program
without a command lists its commands, and a command without an action its actions: code 2 as well,
so that a script that forgot one notices.
"""

import codecs
import io
import os
import shutil
import sys
import textwrap
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from cli.hints import command_line

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


class CommandFailed(Exception):
    """A command cannot run or has to stop. The text says why, in one line."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command. help: its line in the list of commands. run: returns the exit code."""

    help: str
    run: Callable[[Namespace], int]
    add_arguments: Callable[[ArgumentParser], None] = lambda _: None


class NothingChosen(CommandFailed):
    """A command or an action is missing. listing: those that there are, a line each."""

    def __init__(self, message: str, listing: str) -> None:
        self.listing = listing
        super().__init__(message)


class _Parser(ArgumentParser):
    """Accepts no abbreviated flags, and raises CommandFailed where argparse prints its usage."""

    def __init__(self, **options: Any) -> None:
        self._names: _SubParsersAction[Any] | None = None
        super().__init__(allow_abbrev=False, **options)

    def add_subparsers(self, **options: Any) -> "_SubParsersAction[Any]":
        self._names = super().add_subparsers(**options)
        return self._names

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._names is not None and self._names.required and not args:
            raise self._nothing_chosen(self._names)
        found, unknown = super().parse_known_args(args, namespace)
        # Here and not in `parse_args`, so that a command names its own help.
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        raise CommandFailed(f"{message} (see {_typed(self.prog, '--help')})")

    def _nothing_chosen(self, names: "_SubParsersAction[Any]") -> NothingChosen:
        entries = [(each.dest, each.help or "") for each in names._get_subactions()]
        which = f"which {str(names.metavar).lower()}?"
        return NothingChosen(f"{which} (see {_typed(self.prog, '--help')})", listing(entries))


def parser_of(commands: Mapping[str, Command], *, module: str, description: str) -> ArgumentParser:
    """The parser of a program that is started as `python -m MODULE`; it stores the command's name
    as `command`."""
    parser = _Parser(prog=f"python -m {module}", description=description)
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        # A command may describe itself in more words.
        what = f"{command.help[:1].upper()}{command.help[1:]}"
        what = what if what.endswith("?") else f"{what}."
        command.add_arguments(names.add_parser(name, help=command.help, description=what))
    return parser


def listing(entries: Sequence[tuple[str, str]]) -> str:
    """Names and what they do, as lines; a narrow terminal gets what a name does below it."""
    indent = max(len(name) for name, _ in entries) + 2
    width = max(20, shutil.get_terminal_size().columns)
    if width < indent + 24:
        body = (textwrap.indent(textwrap.fill(text, width - 2), "  ") for _, text in entries)
        return "".join(f"{name}\n{text}\n" for (name, _), text in zip(entries, body, strict=True))
    hanging = " " * indent
    return "".join(
        textwrap.fill(text, width, initial_indent=name.ljust(indent), subsequent_indent=hanging)
        + "\n"
        for name, text in entries
    )


def _typed(prog: str, *words: str) -> str:
    """What the user types for a parser's program: `python -m service keys` as he typed `python`."""
    module, *names = prog.removeprefix("python -m ").split()
    return command_line(module, *names, *words)


def exit_code(
    work: Callable[[], int], *, explain: Callable[[Exception], str | None], prefix: str
) -> int:
    """Do the work of a command and return the process's exit code.

    Args:
        explain: the text for an error that the user can correct. "" prints nothing; None raises the
            error again, because it is a defect of the program.
        prefix: the complaint's first word.
    """
    _open_missing()
    escape_unencodable()
    try:
        return _done(work)
    except KeyboardInterrupt:
        _flush_or_discard()
        return INTERRUPTED
    except BrokenPipeError:
        _flush_or_discard()
        return PIPE_CLOSED
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        with suppress(BrokenPipeError):
            if message:
                sys.stderr.write(f"{prefix}: {one_line(message)}\n")
                sys.stderr.flush()
        _flush_or_discard()
        return FAILED


def _done(work: Callable[[], int]) -> int:
    """Do the work, and flush where a closed pipe can still be told from other failures."""
    try:
        code = work()
    except NothingChosen as missing:
        sys.stdout.write(missing.listing)
        sys.stdout.flush()
        raise
    except SystemExit:
        # After --help.
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _open_missing() -> None:
    """Give a process that was started without standard output or error (`>&-`) an empty one."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends


def _flush_or_discard() -> None:
    """Flush both outputs; discard what a closed pipe does not take, because the interpreter flushes
    once more when it exits, and would complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def system_error(error: OSError) -> str:
    """`x.csv: No such file or directory`, without the number that the system has for it."""
    if error.filename is None or error.strerror is None:
        return str(error) or type(error).__name__
    return f"{error.filename}: {error.strerror}"


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
    return _without_controls(" ".join(message.split()))


def plain_lines(text: str) -> str:
    """A text with its lines and tabs, and `?` for other control characters."""
    return "\n".join(
        "\t".join(map(_without_controls, line.split("\t")))
        for line in text.replace("\r\n", "\n").split("\n")
    )


def _without_controls(line: str) -> str:
    return "".join(
        # A no-break space is not printable either.
        character if character.isprintable() else " " if character.isspace() else "?"
        for character in line
    )
