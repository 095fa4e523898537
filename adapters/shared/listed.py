"""One object in a listing."""

from typing import NamedTuple


class Listed(NamedTuple):
    """key: relative to the store. size: in bytes. modified: when it was last written, in seconds on
    the store's own clock: only differences mean something."""

    key: str
    size: int
    modified: float
