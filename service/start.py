"""Why a start fails, in one line. Knows nothing of what is started."""

from adapters.errors import AdapterError


class StartFailed(Exception):
    """The service cannot run like this; the message is the one line that says why."""


def why(error: BaseException) -> str:
    """What is wrong with the machine or the settings says it itself; a defect keeps its name."""
    expected = isinstance(error, (AdapterError, OSError))
    return str(error) if expected else f"{type(error).__name__}: {error}"
