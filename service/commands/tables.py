"""`python -m service settings` and `metrics`: print the tables of the documentation."""

import sys
from argparse import Namespace

from cli.shell import Command


def print_settings(_: Namespace) -> int:
    from service.settings import settings_table

    sys.stdout.write(settings_table())
    return 0


def print_metrics(_: Namespace) -> int:
    from service.observability.metrics import metrics_table

    sys.stdout.write(metrics_table())
    return 0


SETTINGS = Command("print the table of settings", print_settings)
METRICS = Command("print the table of metrics", print_metrics)
