"""`python -m train ablate`: ID-SPAM with one switch changed at a time."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial

from train.commands.experiments import SETTINGS, add_common, conduct, names

HELP = "ID-SPAM with one switch changed at a time"

TASKS = "mrpc,rte,cola"
# Ablations start from a preset, with its switches.
_SETTINGS = (*SETTINGS, "preset")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--switches",
        type=names,
        metavar="S,S",
        help="which ones, as the settings are called (default: all)",
    )
    add_common(parser, tasks=TASKS, settings=_SETTINGS)


def run(arguments: Namespace, given: Sequence[str]) -> int:
    from train.experiments.ablate import SWITCHES, ablate

    switches = tuple(SWITCHES) if arguments.switches is None else arguments.switches
    chosen = partial(ablate, arguments.tasks, arguments.seeds, switches=switches)
    return conduct(arguments, given, chosen)
