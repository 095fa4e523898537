"""`python -m service settings`: README's table."""

import sys
from argparse import ArgumentParser, Namespace

from service.settings import settings_table

HELP = "print the table of settings"


def add_arguments(parser: ArgumentParser) -> None:  # it has none
    pass


def run(_: Namespace) -> int:
    sys.stdout.write(settings_table())
    return 0
