"""`python -m train COMMAND`: from a command line to files, a closing table and an exit code.

torch is imported only after flags and files have been checked.
"""

import sys
from collections.abc import Mapping, Sequence

from adapters.errors import AdapterError
from cli.shell import Command, CommandFailed, exit_code, parser_of, system_error
from train.commands import evaluate, experiments, export_peft, fit, import_peft, profile, push
from train.commands.flags import MODULE
from train.errors import TrainingError, UsageError
from train.loop.launch import Launch, is_first_to_fail

# In the order of the help.
COMMANDS: Mapping[str, Command] = {
    "fit": fit.COMMAND,
    "evaluate": evaluate.COMMAND,
    "profile": profile.COMMAND,
    "push": push.COMMAND,
    "compare": experiments.COMPARE,
    "transfer": experiments.TRANSFER,
    "ablate": experiments.ABLATE,
    "import-peft": import_peft.COMMAND,
    "export-peft": export_peft.COMMAND,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _run(words), explain=_explain, prefix="error")


def _run(argv: Sequence[str]) -> int:
    _check_text(argv)
    description = "Make, measure and publish ID-SPAM adapters."
    arguments = parser_of(COMMANDS, module=MODULE, description=description).parse_args(argv)
    if arguments.command != "fit":
        Launch.from_environment().check_single_process(arguments.command)
    # Reports and model cards quote the command line.
    arguments.argv = argv
    return COMMANDS[arguments.command].run(arguments)


def _explain(error: Exception) -> str | None:
    if not isinstance(error, (CommandFailed, TrainingError, AdapterError, OSError, MemoryError)):
        return None
    # Of several training processes that fail, one complains.
    if not is_first_to_fail():
        return ""
    if isinstance(error, OSError):
        return system_error(error)
    return str(error) or type(error).__name__


def _check_text(argv: Sequence[str]) -> None:
    """Arguments end up in adapter files, cards and reports, which are UTF-8.

    Raises:
        UsageError: an argument that UTF-8 cannot hold.
    """
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"not UTF-8: {argument}: rename it") from None
