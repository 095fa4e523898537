"""What every start ends in: why it failed, in one line, or what is loaded, for good.

Knows nothing of what is started.
"""

import gc

from adapters.errors import AdapterError


class StartFailed(Exception):
    """The service cannot run like this; the message is the one line that says why."""


def why(error: BaseException) -> str:
    """What is wrong with the machine or the settings says it itself; a defect keeps its name."""
    expected = isinstance(error, (AdapterError, OSError))
    return str(error) if expected else f"{type(error).__name__}: {error}"


def settle() -> None:
    """What is loaded stays: the garbage collector need not look at it again.

    Without this every full collection looks through all of torch and transformers while all
    requests wait: 250 ms, twice a second under load.
    """
    gc.collect()
    gc.freeze()
