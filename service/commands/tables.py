"""`python -m service settings` and `metrics`: tables of the documentation, and what is in force."""

import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping

import msgspec

from cli.shell import Command
from cli.tables import print_table

# Other variables that a service follows.
_OTHERS = (
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("OMP_NUM_THREADS", "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_RESOURCE_ATTRIBUTES"),
    *("OTEL_SERVICE_NAME", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"),
)
# Those whose value may have a password in it.
_SECRET = ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OTEL_EXPORTER_OTLP_HEADERS")
_HIDDEN = "(hidden)"
_CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+@")


class InForce(msgspec.Struct, frozen=True):
    """One setting. value: as text; "" if there is none. source: default or environment."""

    variable: str
    value: str
    source: str


def add_settings_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--in-force",
        action="store_true",
        help="what `serve` would use now, and where each value comes from",
    )
    parser.add_argument("--json", action="store_true", help="with --in-force: as JSON")


def print_settings(arguments: Namespace) -> int:
    from service.settings import settings_table

    if not (arguments.in_force or arguments.json):
        sys.stdout.write(settings_table())
        return 0
    rows = [*in_force(os.environ), *_others(os.environ)]
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(rows).decode() + "\n")
    else:
        # What somebody has set is what is looked for.
        rows.sort(key=lambda row: row.source == "default")
        cells = [(row.variable, row.value or "-", row.source) for row in rows]
        print_table(("setting", "value", "from"), cells)
    return 0


def in_force(environ: Mapping[str, str]) -> list[InForce]:
    """All settings, in the order of the documentation; the values of keys are hidden.

    Raises:
        CommandFailed: the service would not start with this environment.
    """
    from dataclasses import fields

    from cli.shell import CommandFailed
    from service.service_links import is_service_link
    from service.settings import SECRET, InvalidSettings, Settings, read_settings, variable

    try:
        read_settings(environ)
    except InvalidSettings as error:
        raise CommandFailed(str(error)) from None
    rows = []
    for setting in fields(Settings):
        name = variable(setting.name)
        given = environ.get(name)
        if given is None or is_service_link(name, given):
            rows.append(InForce(name, setting.metadata["default"], "default"))
        else:
            hidden = setting.name in SECRET and given.strip()
            rows.append(InForce(name, _HIDDEN if hidden else _shown(given), "environment"))
    return rows


def _others(environ: Mapping[str, str]) -> Iterator[InForce]:
    """Variables of other programs that are set and not empty."""
    for name in _OTHERS:
        spelled = next((each for each in (name, name.lower()) if environ.get(each)), None)
        if spelled is not None:
            value = _HIDDEN if name in _SECRET else _shown(environ[spelled])
            yield InForce(spelled, value, "environment")


def _shown(value: str) -> str:
    """A value without the user and the password of a URL."""
    return _CREDENTIALS.sub("...@", value.strip())


def print_metrics(_: Namespace) -> int:
    from service.observability.metrics import metrics_table

    sys.stdout.write(metrics_table())
    return 0


SETTINGS = Command(
    "print the table of settings, or those in force", print_settings, add_settings_arguments
)
METRICS = Command("print the table of metrics", print_metrics)
