"""`python -m train export-peft`: write a LoRA adapter as a folder that PEFT loads."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from cli.imports import importing
from cli.shell import Command
from train.commands.flags import add_own_backbone, announce, naming_the_local_way, stdout
from train.commands.import_peft import naming_peft


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="X.safetensors")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty")
    add_own_backbone(parser)
    parser.add_argument("--quiet", action="store_true", help="the closing line only")


def run(arguments: Namespace) -> int:
    announce(f"{arguments.adapter}: loading PEFT and the base model", arguments)
    with importing(), naming_peft():
        from train.peft.exporting import export_peft

    with naming_the_local_way(arguments.backbone):
        exported = export_peft(arguments.adapter, arguments.folder, backbone=arguments.backbone)
    stdout().print(
        f"{arguments.folder}: {len(exported.spec.labels)} labels on "
        f"{exported.spec.backbone.name}, scores within {exported.difference:.1e} of the service's",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


COMMAND = Command("write a LoRA adapter as a folder that PEFT loads", run, add_arguments)
