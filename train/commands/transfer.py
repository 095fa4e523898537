"""`python -m train transfer`: train on one task, measure another, unseen and after 100 examples."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial

from train.commands.experiments import add_common, add_methods, conduct

HELP = "train on one task, measure another: unseen, and after 100 examples"

# Of these every pair that shares its labels.
TASKS = "sst2,imdb,mrpc,qqp"
METHODS = "idspam,idspam-paper,lpt,lora,fine-tuning"


def add_arguments(parser: ArgumentParser) -> None:
    add_methods(parser, METHODS)
    add_common(parser, tasks=TASKS)


def run(arguments: Namespace, given: Sequence[str]) -> int:
    from train.experiments.transfer import transfer

    chosen = partial(transfer, arguments.tasks, arguments.methods, arguments.seeds)
    return conduct(arguments, given, chosen)
