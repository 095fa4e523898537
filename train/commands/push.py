"""`python -m train push`: publish an adapter file on a running service."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from train.report.progress import LineProgress

HELP = "publish on a running service"
API_KEY_VARIABLE = "IDSPAM_API_KEY"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, type=Path, metavar="X.safetensors")
    parser.add_argument("--name", required=True, help="the name to serve it under")
    parser.add_argument("--url", required=True, help="of the service: http://host:8000")
    parser.add_argument("--api-key", metavar="KEY", help=f"default: ${API_KEY_VARIABLE}")
    parser.add_argument(
        "--if-match", metavar="REVISION", help="publish only if this revision is served now"
    )


def run(arguments: Namespace, _: Sequence[str]) -> int:
    from train.push import push

    pushed = push(
        arguments.adapter,
        arguments.name,
        arguments.url,
        api_key=arguments.api_key or os.environ.get(API_KEY_VARIABLE) or None,
        if_match=arguments.if_match,
        note=lambda message: LineProgress(sys.stderr).note(message),
    )
    sys.stdout.write(f"{pushed.name} {pushed.revision} {pushed.outcome}\n")
    return 0
