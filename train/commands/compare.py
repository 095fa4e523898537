"""`python -m train compare`: every method on every task."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial

from train.commands.experiments import add_common, add_methods, conduct

HELP = "every method on every task: is ID-SPAM the right adapter for mine?"

TASKS = "sst2,mrpc,rte,qnli,qqp,cola"
METHODS = (
    "idspam,idspam-paper,head-only,head-only-mean,prompt-tuning,p-tuning,smop,lpt,dept,idpg,lora,"
    "fine-tuning"
)


def add_arguments(parser: ArgumentParser) -> None:
    add_methods(parser, METHODS)
    add_common(parser, tasks=TASKS)


def run(arguments: Namespace, given: Sequence[str]) -> int:
    from train.experiments.compare import compare

    chosen = partial(compare, arguments.tasks, arguments.methods, arguments.seeds)
    return conduct(arguments, given, chosen)
