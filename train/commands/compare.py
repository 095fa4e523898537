"""`python -m train compare`: every method on every task."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from train.commands.experiments import add_common, conduct, names

HELP = "every method on every task: is ID-SPAM the right adapter for mine?"

TASKS = "sst2,mrpc,rte,qnli,qqp,cola"
METHODS = (
    "idspam,idspam-paper,head-only,head-only-mean,prompt-tuning,p-tuning,smop,lpt,dept,idpg,lora,"
    "fine-tuning"
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--methods", type=names, default=names(METHODS), metavar="M,M", help="default: all"
    )
    add_common(parser, tasks=TASKS)


def run(arguments: Namespace, given: Sequence[str]) -> int:
    from train.experiments.comparison import compare

    return conduct(
        arguments,
        given,
        lambda settings, display: compare(
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
