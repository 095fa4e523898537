"""`python -m train compare | transfer | ablate`: three experiments with flags in common."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.imports import importing
from cli.shell import Command
from train.commands.flags import (
    add_label_separator,
    add_progress,
    add_settings,
    announce,
    naming_the_local_way,
    settings_of,
    stdout,
)

if TYPE_CHECKING:
    from train.experiments.cells import Findings

# The settings that a run of an experiment may be given; the experiment chooses all others.
SETTINGS = (
    "backbone",
    "device",
    "dtype",
    "epochs",
    "batch_size",
    "micro_batch",
    "learning_rate",
    "tuning_rate",
    "warmup_ratio",
    "weight_decay",
    "dropout",
    "patience",
    "max_length",
    "cache",
)
COMPARED_METHODS = (
    "idspam+vectors,vectors,idspam,idspam-paper,head-only,head-only-mean,prompt-tuning,p-tuning,smop,"
    "lpt,dept,idpg,lora,fine-tuning"
)


def _add_compare(parser: ArgumentParser) -> None:
    _add_methods(parser, COMPARED_METHODS)
    _add_common(parser, tasks="sst2,mrpc,rte,qnli,qqp,cola")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="write the weights of every run to DIR/adapters, as adapter files; of fine-tuning and"
        " idpg there is none",
    )
    add_label_separator(parser)


def _add_transfer(parser: ArgumentParser) -> None:
    _add_methods(parser, "idspam+vectors,vectors,idspam,idspam-paper,lpt,lora,fine-tuning")
    # Every pair of these that shares its labels.
    _add_common(parser, tasks="sst2,imdb,mrpc,qqp")


def _add_ablate(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--switches",
        type=_names,
        metavar="S,S",
        help="names of settings; default: all switches that the method has",
    )
    # An ablation starts from a preset, with its switches.
    _add_common(parser, tasks="mrpc,rte,cola", settings=(*SETTINGS, "preset", "method"))
    add_label_separator(parser)


def _run(arguments: Namespace) -> int:
    """Run an experiment; the exit code is 1 if one of its runs failed."""
    announce(f"{arguments.command}: loading torch, the backbone and the tasks", arguments)
    with importing():
        from train.experiments.display import Display, LineDisplay, display_for
        from train.experiments.tables import print_findings

        experiment = _experiment(arguments)
    settings = settings_of(arguments)
    if arguments.quiet:
        display = Display()
    else:
        display = LineDisplay(sys.stderr) if arguments.no_progress else display_for(sys.stderr)
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


def _experiment(arguments: Namespace) -> "Callable[..., Findings]":
    tasks, seeds = arguments.tasks, arguments.seeds
    match arguments.command:
        case "compare":
            from train.experiments.compare import compare

            separator = arguments.label_separator
            return partial(
                compare,
                tasks,
                arguments.methods,
                seeds,
                label_separator=separator,
                keep=arguments.keep,
            )
        case "transfer":
            from train.experiments.transfer import transfer

            return partial(transfer, tasks, arguments.methods, seeds)
        case _:
            from train.experiments.ablate import ablate

            separator = arguments.label_separator
            return partial(
                ablate, tasks, seeds, switches=arguments.switches, label_separator=separator
            )


COMPARE = Command(
    "every method on every task: is ID-SPAM the right adapter for mine?", _run, _add_compare
)
TRANSFER = Command(
    "train on one task, measure another: unseen, and after 100 examples", _run, _add_transfer
)
ABLATE = Command("a method with one switch changed at a time", _run, _add_ablate)


def _add_methods(parser: ArgumentParser, methods: str) -> None:
    parser.add_argument(
        "--methods",
        type=_names,
        default=_names(methods),
        metavar="M,M",
        help=f"default: {methods.replace(',', ', ')}",
    )


def _add_common(parser: ArgumentParser, *, tasks: str, settings: Sequence[str] = SETTINGS) -> None:
    parser.add_argument(
        "--tasks",
        type=_names,
        default=_names(tasks),
        metavar="T,T",
        help=f"names of the registry, files or folders; default: {tasks.replace(',', ', ')}",
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
        help="results.csv, report.md, plots; an interrupted experiment continues from it",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at the same time; default: half the cores, or four on each GPU",
    )
    add_settings(parser.add_argument_group("settings of every run"), settings)
    add_progress(parser)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in _names(text))
    except ValueError:
        raise ArgumentTypeError(f"not whole numbers separated by commas: {text}") from None
