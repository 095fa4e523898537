"""The system's errors as those of the store: StoreFailed, with the reason in the system's words."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import StoreFailed, StoreFull

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def store_failures(root: Path, doing: str) -> Iterator[None]:
    """Raise every OSError of the block as StoreFailed.

    Args:
        root: the store's folder.
        doing: what failed, for the message: `publish 'spam'`.

    Raises:
        StoreFull: no space or no quota is left.
        StoreFailed: for any other OSError.
    """
    try:
        yield
    except OSError as error:
        raise store_failed(root, doing, error) from None


def is_full(error: OSError) -> bool:
    """Whether no space or no quota is left."""
    return error.errno in _FULL


def store_failed(root: Path, doing: str, error: OSError) -> StoreFailed:
    """The error that `store_failures` raises."""
    reason = error.strerror or str(error)
    if isinstance(error, FileNotFoundError) and not root.is_dir():
        reason = "its folder is gone"
    kind = StoreFull if is_full(error) else StoreFailed
    return kind(f"the adapter store cannot {doing}: {reason}")
