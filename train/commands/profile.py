"""`python -m train profile`: write into an adapter file how held-out texts look."""

import hashlib
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from cli.imports import importing
from cli.shell import Command
from train.commands.flags import (
    add_adapter_and_data,
    add_columns,
    add_own_backbone,
    add_progress,
    add_settings,
    check_output,
    computation_of,
    naming_the_local_way,
    progress_of,
    read,
    stdout,
)
from train.report.report import print_line

if TYPE_CHECKING:
    from adapters.format.profile import Histogram


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = (
        "Answer texts that the adapter was not trained on, and write into its file how they look: "
        "labels, confidence, length, unknown tokens. The service compares them with the texts that "
        "it gets. `fit` does this by itself."
    )
    add_adapter_and_data(parser)
    parser.add_argument(
        "--output", type=Path, metavar="Y.safetensors", help="default: the adapter's file itself"
    )
    add_columns(parser)
    add_settings(parser, ("device", "dtype"))
    add_own_backbone(parser)
    add_progress(parser)


def run(arguments: Namespace) -> int:
    output = arguments.output or arguments.adapter
    check_output(output, "--adapter" if arguments.output is None else "--output", ".safetensors")
    computation = computation_of(arguments)
    with progress_of(arguments) as progress:
        data = read(arguments.data, "test", arguments, progress)
        with importing():
            from train.fit.profile import add_profile

        with naming_the_local_way(computation.backbone):
            profile = add_profile(
                arguments.adapter,
                data,
                output,
                backbone=computation.backbone,
                device=computation.device,
                dtype=computation.dtype,
                progress=progress,
            )
    revision = hashlib.sha256(output.read_bytes()).hexdigest()
    console = stdout()
    print_line(console, f"texts       {profile.rows:,}")
    print_line(
        console, f"labels      {sum(map(bool, profile.labels)):,} of {len(profile.labels):,}"
    )
    print_line(console, f"confidence  {_middle(profile.confidence)}")
    print_line(console, f"length      {_middle(profile.length)} tokens")
    print_line(console, f"written: {output}, revision {revision[:12]}")
    return 0


def _middle(histogram: "Histogram") -> str:
    """The bin of the median, in words."""
    half, at = sum(histogram.counts) / 2, 0
    so_far = histogram.counts[0]
    while so_far < half:
        at += 1
        so_far += histogram.counts[at]
    low = f"{histogram.edges[at - 1]:g}" if at else "less"
    high = f"{histogram.edges[at]:g}" if at < len(histogram.edges) else "more"
    return f"median between {low} and {high}"


COMMAND = Command("write into an adapter what its texts look like", run, add_arguments)
