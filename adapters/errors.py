"""What can be refused about adapters, backbones and the store.

Knows no HTTP: `service.errors` maps these to statuses.

    AdapterError
    |-- InvalidAdapter          the file breaks the format; lists every fault
    |-- IncompatibleAdapter     a sound file, but not for the loaded backbone; lists every fault
    |-- UnloadedAdapter         stored, and not served until somebody loads it
    |-- UnsupportedBackbone     a model that cannot take the packed road
    |-- UnusableBackbone        a supported family, but its files are not what they should be
    `-- StoreError
        |-- InvalidName
        |-- UnknownAdapter
        |-- UnknownRevision
        |-- RevisionConflict    compare-and-swap failed
        `-- DamagedFile         stored bytes no longer have the hash they are named by
"""

from collections.abc import Sequence


class AdapterError(Exception):
    """Base of everything this package refuses."""


class _Faulty(AdapterError):
    """An error that carries a list of faults, each one a sentence."""

    summary = "refused"

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"{self.summary}: " + "; ".join(self.faults))


class InvalidAdapter(_Faulty):
    """The bytes are not an adapter file; `faults` names everything that is wrong with them."""

    summary = "not a valid adapter"


class IncompatibleAdapter(_Faulty):
    """A valid adapter of another backbone; `faults` names every difference."""

    summary = "made for another backbone"


class UnloadedAdapter(AdapterError):
    """Taken out of service on demand; its files stay where they are."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"adapter {name!r} is unloaded: load it, or publish it again")


class UnsupportedBackbone(AdapterError):
    """This model family cannot be run as a packed batch with prompt slots."""


class UnusableBackbone(AdapterError):
    """The backbone's files are missing, unreadable or not the expected ones."""


class StoreError(AdapterError):
    """Base of what the versioned store refuses."""


class InvalidName(StoreError):
    """The adapter name is not `[a-z0-9][a-z0-9._-]{0,63}`."""


class UnknownAdapter(StoreError):
    """No adapter is stored under this name."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(f"no adapter is named {name!r}; known: {listing(self.known)}")


class UnknownRevision(StoreError):
    """The adapter exists, but none or several of its revisions match."""

    def __init__(self, name: str, revision: str, known: Sequence[str]) -> None:
        self.name = name
        self.revision = revision
        self.known = tuple(known)
        super().__init__(
            f"adapter {name!r} has no single revision {revision!r}; "
            f"known: {listing([item[:12] for item in self.known])}"
        )


class RevisionConflict(StoreError):
    """The adapter's current revision is not the one that the caller expected."""

    def __init__(self, name: str, expected: str, current: str | None) -> None:
        self.name = name
        self.expected = expected
        self.current = current
        super().__init__(
            f"adapter {name!r} is at {current or 'no revision'}, the caller expected {expected}"
        )


class DamagedFile(StoreError):
    """A stored file is missing or does not have the hash that it is named by."""


def listing(items: Sequence[str], limit: int = 20) -> str:
    """`a, b, c and 7 more`, for messages that name what exists."""
    if not items:
        return "none"
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
