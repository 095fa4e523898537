"""`python -m train transfer`: train on one task, measure another, unseen and after 100 examples."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from train.commands.experiments import add_common, conduct, names

HELP = "train on one task, measure another: unseen, and after 100 examples"

# Of these every pair that shares its labels.
TASKS = "sst2,imdb,mrpc,qqp"
METHODS = "idspam,idspam-paper,lpt,lora,fine-tuning"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--methods", type=names, default=names(METHODS), metavar="M,M", help="default: %(default)s"
    )
    add_common(parser, tasks=TASKS)


def run(arguments: Namespace, given: Sequence[str]) -> int:
    from train.experiments.transfer import transfer

    return conduct(
        arguments,
        given,
        lambda settings, display: transfer(
            arguments.tasks,
            arguments.methods,
            arguments.seeds,
            settings,
            arguments.output,
            data_root=arguments.data_root,
            jobs=arguments.jobs,
            display=display,
        ),
    )
