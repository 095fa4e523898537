"""Errors of adapters, backbones and the store; `service.errors` maps them to HTTP statuses."""

import unicodedata
from collections.abc import Sequence

# Control characters, line and paragraph separators; and surrogates, which UTF-8 cannot encode.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Embeddings, overrides and isolates: they show the text around them in another order.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class AdapterError(Exception):
    """Base of all errors of this package."""


class _Faulty(AdapterError):
    """An error with a list of faults, which may quote what a file says."""

    summary = "refused"

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(map(with_escapes, faults))
        super().__init__(f"{self.summary}: " + "; ".join(self.faults))


class InvalidAdapter(_Faulty):
    """The bytes are not an adapter file; `faults` lists all that is wrong."""

    summary = "not a valid adapter"


class IncompatibleAdapter(_Faulty):
    """A valid adapter for another backbone; `faults` lists every difference."""

    summary = "made for another backbone"


class UnforcedReplacement(AdapterError):
    """The new revision means something else than the one it would replace.

    changes: what differs, in words.
    """

    def __init__(self, name: str, changes: Sequence[str]) -> None:
        self.name = name
        self.changes = tuple(changes)
        super().__init__(
            f"this file would change what adapter {name!r} answers: {'; '.join(self.changes)}. "
            "Send it with ?force=true, or with If-Match and the current revision"
        )


class UnloadedAdapter(AdapterError):
    """The adapter was taken out of service on request; its files are kept."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"adapter {name!r} is unloaded: load it, or publish it again")


class UnsupportedBackbone(AdapterError):
    """This model family cannot run packed batches with soft prompts."""


class UnusableBackbone(AdapterError):
    """The backbone's files are missing, unreadable or not the expected ones."""


class UncuttableText(AdapterError):
    """A long text that cannot be divided without a risk of other tokens.

    index: which one it was, where several were encoded together.
    """

    def __init__(self, longest: int, index: int = 0) -> None:
        self.index = index
        super().__init__(
            f"more than {longest} characters without a place to divide them: a space after a "
            "letter, for instance. Send less of this text"
        )


class StoreError(AdapterError):
    """Base of the store's errors."""


class InvalidName(StoreError):
    """The adapter name is not `[a-z0-9][a-z0-9._-]{0,63}`."""


class UnknownAdapter(StoreError):
    """No adapter is stored under this name."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(f"no adapter is named {name!r}; known: {listing(self.known)}")


class UnknownRevision(StoreError):
    """The adapter exists, but none or several of its revisions match.

    Attributes:
        revision: what was asked for; None: the one before the current one.
    """

    def __init__(self, name: str, revision: str | None, known: Sequence[str]) -> None:
        self.name = name
        self.revision = revision
        self.known = tuple(known)
        shown = [each[:12] for each in self.known]
        if revision is None:
            message = f"adapter {name!r} has no revision before the current one"
        elif sum(each.startswith(revision) for each in self.known) > 1:
            message = f"adapter {name!r} has several revisions that begin with {revision!r}"
        else:
            message = f"adapter {name!r} has no revision {revision!r}"
        super().__init__(f"{message}; known: {listing(shown)}")


class RevisionConflict(StoreError):
    """The adapter's current revision is not the one that the caller expected."""

    def __init__(self, name: str, expected: str, current: str | None) -> None:
        self.name = name
        self.expected = expected
        self.current = current
        super().__init__(
            f"adapter {name!r} is at {current or 'no revision'}, the caller expected {expected}"
        )


class CurrentRevision(StoreError):
    """The current revision cannot be deleted alone."""

    def __init__(self, name: str, revision: str) -> None:
        self.name = name
        self.revision = revision
        super().__init__(
            f"{revision[:12]} is the current revision of adapter {name!r}: roll back or publish "
            "another one first, or delete the adapter"
        )


class NoCard(StoreError):
    """No model card was stored with this revision."""

    def __init__(self, name: str, revision: str) -> None:
        self.name = name
        super().__init__(f"adapter {name!r} has no model card for revision {revision[:12]}")


class NoTraffic(StoreError):
    """The texts of this adapter are not divided between revisions."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"the texts of adapter {name!r} are not divided between two revisions")


class RevisionServed(StoreError):
    """The revision is the current one, so it cannot be tried beside it."""

    def __init__(self, name: str, revision: str) -> None:
        self.name = name
        super().__init__(
            f"{revision[:12]} is the current revision of adapter {name!r}: it reads all texts "
            "already"
        )


class RevisionTried(StoreError):
    """The revision reads some of its name's texts, so it cannot be deleted."""

    def __init__(self, name: str, revision: str) -> None:
        self.name = name
        super().__init__(
            f"{revision[:12]} reads some of the texts of adapter {name!r}: end that first "
            f"(DELETE /v1/adapters/{name}/traffic)"
        )


class UnlikeRevision(StoreError):
    """The revision would answer some of a name's texts with other labels or for another task.

    changes: what differs, in words.
    """

    def __init__(self, name: str, revision: str, changes: Sequence[str]) -> None:
        self.name = name
        self.changes = tuple(changes)
        super().__init__(
            f"{revision[:12]} answers something else than the current revision of adapter "
            f"{name!r}: {'; '.join(self.changes)}. It can be tried with shadow: true"
        )


class DamagedFile(StoreError):
    """A stored file is missing, or its bytes do not match the hash in its name."""


class StoreInUse(StoreError):
    """Another service uses the store's folder."""


class StoreFailed(StoreError):
    """The disk failed, is read-only or gone; the message has the system's reason."""


class StoreFull(StoreFailed):
    """No space is left, or no quota."""


class StoreUnreachable(StoreFailed):
    """The shared store did not answer, or failed. What was asked of it may still have happened."""


class UnknownOutcome(StoreUnreachable):
    """The shared store failed while a change was written, and cannot say what became of it.

    Who reads the log later sees whether the change is in it.
    """


class StoreDenied(StoreFailed):
    """The shared store refused the credentials, or there are none."""


class NewerStore(StoreError):
    """The shared store was written by a newer version of the service: nothing of it is applied."""

    def __init__(self, key: str, found: int, known: int) -> None:
        self.key = key
        super().__init__(
            f"{key} in the shared store has format {found}, and this version reads formats up to "
            f"{known}: upgrade this service"
        )


class OtherBackbone(StoreError):
    """The shared store belongs to replicas of another backbone."""


class DamagedStore(StoreError):
    """An object of the shared store is not what was written: nothing of it is applied."""


class CollectedEntries(StoreError):
    """The log's next entries were collected: load the newest snapshot and go on from there."""


def listing(items: Sequence[str], limit: int = 20) -> str:
    """`a, b, c and 7 more`, for error messages."""
    if not items:
        return "none"
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def is_control(character: str) -> bool:
    """Whether a character ends a line, moves a cursor, reorders the text around it or is none."""
    return character in _REORDERING or unicodedata.category(character) in _UNPRINTABLE


def with_escapes(text: str) -> str:
    """A text with its control characters and lone surrogates as escapes."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if is_control(char) else char for char in text
    )
