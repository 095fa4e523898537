"""Types of command-line arguments: what is out of range is refused before anything is measured."""

from argparse import ArgumentTypeError
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def parse(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise ArgumentTypeError(f"{value!r}: expected a whole number from {least} on")
        return int(value)

    return parse


def duration(value: str) -> float:
    """A positive number of them, at most an hour."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 3600.0:
        raise ArgumentTypeError(f"{value!r}: expected seconds, more than 0 and at most 3600")
    return number


def counts(value: str) -> list[int]:
    """Whole numbers from 1 on, separated by commas."""
    return [at_least(1)(item) for item in value.split(",")]
