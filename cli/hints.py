"""Commands that a message tells the user to type: they run as they are printed.

They begin with the interpreter that the user typed, as `.venv/bin/python`: another one may lack the
packages. Words are quoted for a POSIX shell. `portable` is for files that others read, such as a
model card.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# What Python sets where it was not started by a command line.
_UNKNOWN = ("", "-c", "-")
# Options of the interpreter that have their value in the next word.
_WITH_VALUE = ("-W", "-X")


def command_line(module: str, *words: str) -> str:
    """`.venv/bin/python -m MODULE WORDS`, with the interpreter that runs this."""
    return shlex.join([*_interpreter(), "-m", module, *words])


def portable(module: str, *words: str) -> str:
    """`python -m MODULE WORDS`, for files that are read elsewhere."""
    return shlex.join(["python", "-m", module, *words])


def as_typed(command: str) -> str:
    """A command of `portable` with the interpreter that runs this; any other one as it is."""
    first, space, rest = command.partition(" ")
    return f"{shlex.join(_interpreter())}{space}{rest}" if first == "python" else command


def option(flag: str, value: object) -> list[str]:
    """A flag and its value as words; as one word if the value would be taken for a flag."""
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _interpreter() -> list[str]:
    """The first words of the command line that started this process, up to `-m`."""
    typed: Sequence[str] = sys.orig_argv
    if len(typed) > 1 and typed[0] not in _UNKNOWN:
        kept = [typed[0]]
        words = iter(typed[1:])
        for word in words:
            if word == "-m":
                return kept
            if not word.startswith("-"):
                break
            kept.append(word)
            if word in _WITH_VALUE:
                kept.append(next(words, ""))
    return [_shown(sys.executable)]


def _shown(path: str) -> str:
    """A path below the working directory as the user would type it."""
    try:
        shown = str(Path(path).relative_to(Path.cwd())) if path else "python"
    except (OSError, ValueError):
        return path
    return shown if "/" in shown or not path else f"./{shown}"
