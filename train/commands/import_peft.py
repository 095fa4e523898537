"""`python -m train import-peft`: make an adapter of what PEFT has saved."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.hints import command_line, portable
from cli.imports import importing
from cli.shell import Command
from train.commands.flags import (
    MODULE,
    add_overwrite,
    announce,
    check_new,
    check_output,
    naming_the_local_way,
    stdout,
)
from train.errors import PeftError


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of PEFT's save_pretrained")
    parser.add_argument(
        "--labels",
        required=True,
        nargs="+",
        metavar="L",
        help="the labels, in the order of the model's outputs",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="X.safetensors")
    parser.add_argument(
        "--backbone",
        metavar="S",
        help="the base model: a folder or a hub name; default: the one that FOLDER names",
    )
    parser.add_argument(
        "--same-base-model",
        action="store_true",
        help="the backbone is the base model, although FOLDER has another name for it",
    )
    parser.add_argument(
        "--multi-label",
        action="store_true",
        help="a text may have several labels; default: as the base model's problem_type says",
    )
    parser.add_argument(
        "--end-token",
        action="store_true",
        help="GPT-2: the texts of training ended with <|endoftext|>, and the head reads it",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a text at most; default: all that the base model takes",
    )
    add_overwrite(parser)
    parser.add_argument("--quiet", action="store_true", help="the closing line only")


def run(arguments: Namespace) -> int:
    check_output(arguments.output, "--output", ".safetensors")
    check_new([arguments.output], overwrite=arguments.overwrite)
    announce(f"{arguments.folder}: loading PEFT and the base model", arguments)
    with importing(), naming_peft():
        from adapters.format.files import save_adapter
        from train.peft.importing import import_peft

    with naming_the_local_way(arguments.backbone):
        imported = import_peft(
            arguments.folder,
            arguments.labels,
            backbone=arguments.backbone,
            same_base_model=arguments.same_base_model,
            multi_label=arguments.multi_label,
            max_length=arguments.max_length,
            end_token=arguments.end_token,
            command=portable(MODULE, *arguments.argv),
        )
    save_adapter(arguments.output, imported.adapter)
    spec = imported.adapter.spec
    stdout().print(
        f"{arguments.output}: {spec.method} on {spec.backbone.name}, {len(spec.labels)} labels, "
        f"scores within {imported.difference:.1e} of PEFT's",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


@contextmanager
def naming_peft() -> Iterator[None]:
    """Around imports of `train.peft`.

    Raises:
        PeftError: the package `peft` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        install = command_line("pip", "install", "peft")
        raise PeftError(f"this needs the package peft: {install}") from None


COMMAND = Command("make an adapter of what PEFT has saved", run, add_arguments)
