"""The end of a start: the error that stopped it, or freezing what was loaded."""

import gc

from adapters.errors import AdapterError


class StartFailed(Exception):
    """The service cannot start; the message is one line that says why."""


def start_error(error: BaseException) -> str:
    """Why a start failed, in one line. Errors that are not expected keep their class name."""
    expected = isinstance(error, (AdapterError, OSError))
    return str(error) if expected else f"{type(error).__name__}: {error}"


def freeze_loaded_objects() -> None:
    """Exempt everything loaded so far from garbage collection.

    Otherwise every full collection walks through torch and transformers while all requests wait:
    250 ms, twice a second under load.
    """
    gc.collect()
    gc.freeze()
