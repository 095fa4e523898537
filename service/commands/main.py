"""`python -m service COMMAND`: from a command line to its exit code."""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cli.shell import Command, CommandFailed, exit_code, parser_of
from service.client import ClientError
from service.client.errors import describe
from service.commands import adapters, batch, demo, drift, keys, predict, tables, top

# In the order of the help.
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "predict": predict.COMMAND,
        "batch": batch.COMMAND,
        "adapters": adapters.COMMAND,
        "keys": keys.COMMAND,
        "top": top.COMMAND,
        "drift": drift.COMMAND,
        "demo": demo.COMMAND,
        "settings": tables.SETTINGS,
        "metrics": tables.METRICS,
    }
)


def main(argv: Sequence[str]) -> int:
    """Run one command and return the process's exit code."""

    def run() -> int:
        arguments = parser().parse_args(argv)
        return COMMANDS[arguments.command].run(arguments)

    return exit_code(run, explain=_explain, prefix="service")


def parser() -> ArgumentParser:
    description = "Without a command it serves, with settings from the environment (IDSPAM_*)."
    return parser_of(COMMANDS, prog="python -m service", description=description)


def _explain(error: Exception) -> str | None:
    if isinstance(error, ClientError):
        return describe(error)
    return str(error) if isinstance(error, (CommandFailed, OSError)) else None
