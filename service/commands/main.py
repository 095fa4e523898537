"""`python -m service COMMAND`: from a command line to its exit code."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cli.hints import command_line
from cli.shell import Command, CommandFailed, exit_code, parser_of, system_error
from service.client import ClientError, Unreachable
from service.client.errors import describe
from service.commands import adapters, batch, demo, doctor, drift, keys, predict, tables, top


def _serve(_: Namespace) -> int:
    # `service.__main__` serves without this module: a service needs none of the commands.
    from service.__main__ import serve

    return serve()


def _describe_serving(parser: ArgumentParser) -> None:
    parser.description = (
        "Serve adapters over HTTP. Settings come from the environment: with IDSPAM_PORT=8080 it "
        f"listens on another port. `{command_line('service', 'settings')}` lists all of them."
    )


SERVE = Command(
    "serve adapters over HTTP; settings are IDSPAM_* of the environment", _serve, _describe_serving
)

# In the order of the help.
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "serve": SERVE,
        "predict": predict.COMMAND,
        "batch": batch.COMMAND,
        "adapters": adapters.COMMAND,
        "keys": keys.COMMAND,
        "top": top.COMMAND,
        "drift": drift.COMMAND,
        "demo": demo.COMMAND,
        "doctor": doctor.COMMAND,
        "settings": tables.SETTINGS,
        "metrics": tables.METRICS,
    }
)


_THIS_MACHINE = ("//127.0.0.1", "//localhost", "//[::1]")


def main(argv: Sequence[str]) -> int:
    """Run one command and return the process's exit code."""

    def run() -> int:
        arguments = parser().parse_args(argv)
        return COMMANDS[arguments.command].run(arguments)

    return exit_code(run, explain=_explain, prefix="service")


def parser() -> ArgumentParser:
    description = "Serve adapters, and use a service that runs."
    return parser_of(COMMANDS, module="service", description=description)


def _explain(error: Exception) -> str | None:
    if isinstance(error, Unreachable) and any(place in str(error) for place in _THIS_MACHINE):
        return f"{describe(error)}; `{command_line('service', 'serve')}` starts one"
    if isinstance(error, ClientError):
        return describe(error)
    if isinstance(error, OSError):
        return system_error(error)
    return str(error) if isinstance(error, CommandFailed) else None
