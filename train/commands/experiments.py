"""What `compare`, `transfer` and `ablate` have in common: flags, a display, a closing table."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from train.commands.flags import (
    add_settings,
    add_showing,
    naming_the_local_way,
    settings_of,
    stdout,
)
from train.errors import UsageError

if TYPE_CHECKING:
    from train.experiments.session import Findings

    Experiment: TypeAlias = Callable[..., Findings]

# What a run of an experiment may be given; the rest is the experiment's own.
SETTINGS = (
    "backbone",
    "device",
    "dtype",
    "epochs",
    "batch_size",
    "micro_batch",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "dropout",
    "patience",
    "max_length",
    "cache",
)


def add_common(parser: ArgumentParser, *, tasks: str, settings: Sequence[str] = SETTINGS) -> None:
    """Flags of all experiments. tasks: what is taken where none are given."""
    parser.add_argument(
        "--tasks",
        type=names,
        default=names(tasks),
        metavar="T,T",
        help="names of the registry, files or folders (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=_numbers, default=(0, 1, 2), metavar="N,N", help="default: 0,1,2"
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="D",
        help="folder of <task>/{train,validation,test}.jsonl.gz; default: the hub",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="results.csv, report.md, plots; a killed run goes on from it",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs beside each other; default: half the cores, on GPUs four each",
    )
    add_settings(parser.add_argument_group("settings of every run"), settings)
    add_showing(parser)


def add_methods(parser: ArgumentParser, methods: str) -> None:
    """`--methods`."""
    parser.add_argument(
        "--methods",
        type=names,
        default=names(methods),
        metavar="M,M",
        help=f"default: {methods.replace(',', ', ')}",
    )


def conduct(arguments: Namespace, given: Sequence[str], experiment: "Experiment") -> int:
    """Run one; the exit code is 1 where a run of it failed."""
    from train.experiments.closing import print_findings
    from train.experiments.display import LineDisplay, SilentDisplay, display_for

    settings = settings_of(arguments, given)
    display = (
        SilentDisplay()
        if arguments.quiet
        else LineDisplay(sys.stderr)
        if arguments.no_progress
        else display_for(sys.stderr)
    )
    with display, naming_the_local_way(settings.backbone):
        findings = experiment(
            settings=settings,
            output=arguments.output,
            data_root=arguments.data_root,
            jobs=arguments.jobs,
            display=display,
        )
    print_findings(findings, stdout())
    return 1 if findings.failed else 0


def names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in names(text))
    except ValueError:
        raise UsageError(f"not whole numbers separated by commas: {text}") from None
