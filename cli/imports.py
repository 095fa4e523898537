"""Importing what is large: torch, transformers, the service."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import in this block without looking for garbage.

    Modules make millions of objects, all of which stay, and Python looks through them again and
    again while it imports: a fifth of the time that torch and transformers take. They are exempt
    afterwards, too: otherwise the first collection looks through all of them at once.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
