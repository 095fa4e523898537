"""Why training refuses to run. The command line prints `error: ...` in one line and exits with 2.

TrainingError
|-- UsageError          the command line cannot be parsed
|-- SettingsError       settings that cannot be used; lists every fault
|-- DataError           an input file or data set cannot be used; names the file and the line
|-- OutputError         the output cannot be written to this place
|-- ResumeError         there is no saved state, or it belongs to another run
|-- PeftError           a folder of PEFT or an adapter that the other side cannot express
`-- PushError           the service refused the adapter, or did not answer
"""

from collections.abc import Sequence
from pathlib import Path


class TrainingError(Exception):
    """Base of all errors here; the text is one line for the user."""


class UsageError(TrainingError):
    """An unknown command or flag, or a value of the wrong type."""


class SettingsError(TrainingError):
    """Settings that cannot be used; `faults` lists every reason."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


class DataError(TrainingError):
    """An input that cannot be read or trained on.

    source: path or hub name. line: from 1; the number of the row in formats without lines.
    """

    def __init__(self, message: str, *, source: Path | str, line: int | None = None) -> None:
        self.source = str(source)
        self.line = line
        where = self.source if line is None else f"{self.source}:{line}"
        super().__init__(f"{where}: {message}")


class OutputError(TrainingError):
    """The folder of an output file is missing, not a folder, or not writable."""


class ResumeError(TrainingError):
    """`--resume` without a saved state, or with the state of other data or settings."""


class PeftError(TrainingError):
    """A folder of PEFT that cannot be served exactly, or an adapter that PEFT cannot express."""


class PushError(TrainingError):
    """An adapter did not reach the service, which keeps its revision."""
