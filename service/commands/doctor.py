"""`python -m service doctor`: what keeps a service from starting here, and how to mend it.

Every finding is printed as soon as it is known. The exit code is 1 if something is wrong; what is
merely worth knowing is a warning.
"""

import os
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable
from shutil import get_terminal_size

import msgspec

from cli.shell import Command, one_line
from service.commands.diagnosis import CHECKS, Finding, findings
from service.settings import InvalidSettings, Settings, read_settings

SOMETHING_WRONG = 1
# Importing torch and loading the backbone take most of the time.
_SLOW = ("device", "backbone")
# Narrower terminals get a finding's message below its name. Else messages begin in this column.
_NARROW, _INDENT = 60, 23
_MARKS = {"ok": "ok     ", "warning": "warning", "wrong": "WRONG  "}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a list of findings as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="without importing torch and loading the backbone"
    )


def run(arguments: Namespace) -> int:
    found: list[Finding] = []

    def tell(finding: Finding) -> None:
        found.append(finding)
        if not arguments.json:
            _print(finding)

    settings = _settings(tell)
    for check in CHECKS:
        if arguments.quick and check in _SLOW:
            continue
        if check in _SLOW:
            _note(f"looking at the {check} ...")
        for finding in findings(check, settings):
            tell(finding)
    counts: Counter[str] = Counter(finding.state for finding in found)
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        _print_line(_summary(counts))
    return SOMETHING_WRONG if counts["wrong"] else 0


COMMAND = Command("look for what keeps a service from running here", run, add_arguments)


def _settings(tell: Callable[[Finding], None]) -> Settings:
    """The environment's, or the defaults where they cannot be read."""
    try:
        settings = read_settings(os.environ)
    except InvalidSettings as error:
        for fault in error.faults:
            tell(Finding("settings", "wrong", fault, "the checks below are of the other settings"))
        faulty = {fault.partition(":")[0] for fault in error.faults}
        try:
            return read_settings({k: v for k, v in os.environ.items() if k not in faulty})
        except InvalidSettings:
            return Settings()
    number = sum(name.startswith("IDSPAM_") for name in os.environ)
    tell(Finding("settings", "ok", f"{number} from the environment, all others are the defaults"))
    return settings


def _print(finding: Finding) -> None:
    """`ok      python         3.11.2`, with the remedy below; a narrow terminal gets more lines."""
    mark, check = _MARKS[finding.state], finding.check
    texts = [finding.message, *([f"-> {finding.remedy}"] if finding.remedy else [])]
    width = get_terminal_size().columns if sys.stdout.isatty() else None
    if width is not None and width < _NARROW:
        _print_line(f"{mark} {check}")
        for text in texts:
            _print_line(_wrapped(one_line(text), width, indent=2))
        return
    for number, text in enumerate(texts):
        head = f"{mark} {check:<14} " if number == 0 else " " * _INDENT
        line = head + one_line(text)
        _print_line(line if width is None else _wrapped(line, width, indent=_INDENT, head=head))


def _wrapped(text: str, width: int, *, indent: int, head: str | None = None) -> str:
    """Paths and commands stay whole, so that they can be copied."""
    first = " " * indent if head is None else head
    body = text if head is None else text.removeprefix(head)
    return textwrap.fill(
        body,
        width,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _summary(counts: "Counter[str]") -> str:
    wrong, warnings = counts["wrong"], counts["warning"]
    if not wrong and not warnings:
        return "nothing is wrong"
    parts = [f"{wrong} wrong"] if wrong else ["nothing is wrong"]
    parts += [f"{warnings} warning{'s' * (warnings > 1)}"] if warnings else []
    return ", ".join(parts)
