"""`python -m service metrics`: the documentation's table."""

import sys
from argparse import ArgumentParser, Namespace

HELP = "print the table of metrics"


def add_arguments(parser: ArgumentParser) -> None:  # it has none
    pass


def run(_: Namespace) -> int:
    from service.observability.metrics import metrics_table

    sys.stdout.write(metrics_table())
    return 0
