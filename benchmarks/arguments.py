"""Arguments that several benchmarks share; values out of range are refused before measuring."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable

from adapters.backbone.loading import DEFAULT_BACKBONE
from benchmarks.shapes import SHAPES


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number that must not be smaller."""

    def parse(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise ArgumentTypeError(f"{value!r}: expected a whole number, at least {least}")
        return int(value)

    return parse


def time_of(unit: str, *, most: int) -> Callable[[str], float]:
    """A parser of a time in this unit: more than 0, and no more than `most`."""

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0.0 < number <= most:
            raise ArgumentTypeError(f"{value!r}: expected {unit}, more than 0 and at most {most}")
        return number

    return parse


duration = time_of("seconds", most=3600)


def counts(value: str) -> list[int]:
    """Positive whole numbers, separated by commas."""
    return [at_least(1)(number) for number in value.split(",")]


def add_backbone_argument(parser: ArgumentParser) -> None:
    """`--backbone`."""
    parser.add_argument(
        "--backbone",
        default=DEFAULT_BACKBONE,
        help=f"a folder, a name, or a shape with random weights: {', '.join(SHAPES)}",
    )


def add_device_arguments(
    parser: ArgumentParser, *, dtype: str = "auto", narrow: bool = True
) -> None:
    """`--device` and `--dtype`. narrow: whether int8 and float8 are choices."""
    parser.add_argument("--device", default="auto")
    choices = ["auto", "float32", "bfloat16", *(["int8", "float8"] if narrow else [])]
    parser.add_argument("--dtype", choices=choices, default=dtype)


def add_model_arguments(
    parser: ArgumentParser, *, dtype: str = "auto", narrow: bool = True
) -> None:
    """`--backbone`, `--device` and `--dtype`."""
    add_backbone_argument(parser)
    add_device_arguments(parser, dtype=dtype, narrow=narrow)


def add_workers_argument(parser: ArgumentParser) -> None:
    """`--workers`."""
    parser.add_argument("--workers", type=at_least(0), default=0, help="IDSPAM_WORKERS")
