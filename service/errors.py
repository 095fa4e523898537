"""What the service refuses or fails at; `service.http.errors` has the table of statuses.

    ServiceError
    |-- RequestError              the client can correct the request
    |   |-- MalformedRequest      the body cannot be parsed
    |   |-- InvalidRequest        it is parsed, but not acceptable; lists every fault
    |   |   `-- NoInputs          it has nothing to classify
    |   |-- TooLarge              the body, or the number of inputs
    |   |-- BodyTimeout           the body stalls or comes too slowly
    |   |-- Unauthorized          no key, or an unknown one
    |   |   |-- KeyExpired        a key whose time is over
    |   |   `-- KeyRevoked        a key that was taken back
    |   `-- Forbidden             a known key that may not do this, or a web page of another origin
    |-- QuotaExceeded             the key's quota is used up; says when to retry
    |-- TextsNotKept              this service keeps no texts to be labelled
    |-- TooManyFailures           this address has sent too many wrong keys; says when to retry
    |-- Overloaded                not admitted: too much waits or is read; when to retry
    |-- DeadlineExceeded          it cannot be answered in the time that the client allows
    |-- InferenceFailed           the batch failed, or the scores are not finite
    |-- AdapterLoadFailed         a registered adapter's file has vanished, is damaged or unusable
    |-- AuditFailed               a change cannot be recorded, so it was not made
    |-- RolloutRefused            a replica cannot serve a revision, so none does
    |-- RolloutTimeout            replicas are not ready for a revision in time, so none serves it
    `-- Unavailable               no request is answered now
        |-- NotReady              not yet: loading or warming up
        |-- LeaseExpired          this replica does not know the newest changes
        `-- EngineUnavailable     no longer: draining, stopped or dead

Clients also get the errors of `adapters.errors`: unknown names, conflicts, invalid adapter files.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar

from adapters.errors import listing

E = TypeVar("E", bound=BaseException)

InferenceFailure: TypeAlias = Literal["out_of_memory", "not_finite", "batch_error"]
OverloadReason: TypeAlias = Literal["queue", "share", "deadline"]


class ServiceError(Exception):
    """Base of everything that a request can fail with."""


class RequestError(ServiceError):
    """Base of the errors that are in the request itself."""


class MalformedRequest(RequestError):
    """The body is not of its content type."""


class InvalidRequest(RequestError):
    """The request is parsed, but not acceptable; `details` names every fault."""

    def __init__(self, details: Sequence[str]) -> None:
        self.details = tuple(details)
        super().__init__(listing(self.details))


class NoInputs(InvalidRequest):
    """An empty list of inputs."""

    def __init__(self) -> None:
        super().__init__(["inputs: empty, expected at least one text"])


class TooLarge(RequestError):
    """The body or the number of inputs is over its limit."""


class BodyTimeout(RequestError):
    """The body stalls, or comes more slowly than the settings allow."""


class Unauthorized(RequestError):
    """No key, or an unknown one."""


class Forbidden(RequestError):
    """A known key that may not do this, or a web page of another origin."""


class KeyExpired(Unauthorized):
    """The key was right, but its time is over."""


class KeyRevoked(Unauthorized):
    """The key was right, but it was taken back."""


class QuotaExceeded(ServiceError):
    """The key has used up its requests or tokens. retry_after: seconds until it has some again."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class TextsNotKept(ServiceError):
    """The settings keep no texts of low confidence."""

    def __init__(self) -> None:
        super().__init__(
            "this service keeps no texts: IDSPAM_UNCERTAIN_TEXTS says how many it keeps"
        )


class TooManyFailures(ServiceError):
    """The address has sent too many wrong keys. retry_after: seconds until its next try."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class Overloaded(ServiceError):
    """Not admitted.

    retry_after: seconds until it would be, at the measured rate and if nothing else came. reason:
    `queue`, the tokens that wait are at their bound; `share`, they are, and this client or adapter
    has its share of them; `deadline`, the answer would come after the request's deadline.
    """

    def __init__(
        self, message: str, *, retry_after: float, reason: OverloadReason = "queue"
    ) -> None:
        self.retry_after = retry_after
        self.reason: OverloadReason = reason
        super().__init__(message)


class DeadlineExceeded(ServiceError):
    """The deadline has passed, or will have before the device could be done."""


class InferenceFailed(ServiceError):
    """The device failed on rows of this request, or their scores are not finite."""

    def __init__(self, message: str, *, reason: InferenceFailure = "batch_error") -> None:
        self.reason: InferenceFailure = reason
        super().__init__(message)


class AdapterLoadFailed(ServiceError):
    """A registered adapter cannot be loaded. Other adapters are not affected."""

    def __init__(self, name: str, revision: str, reason: str) -> None:
        self.name = name
        self.revision = revision
        super().__init__(f"adapter {name!r} ({revision[:12]}) cannot be loaded: {reason}")


class AuditFailed(ServiceError):
    """A change cannot be recorded in the audit log, so it was not made."""


class RolloutRefused(ServiceError):
    """A replica cannot serve a revision. No replica serves it; what was current still is."""

    def __init__(self, name: str, replica: str, reason: str) -> None:
        self.name = name
        self.replica = replica
        super().__init__(f"replica {replica} refuses this revision of adapter {name!r}: {reason}")


class RolloutTimeout(ServiceError):
    """Some replicas are alive, but were not ready in time. What was current still is."""

    def __init__(self, name: str, replicas: Sequence[str], seconds: float) -> None:
        self.name = name
        self.replicas = tuple(replicas)
        super().__init__(
            f"not ready for this revision of adapter {name!r} after {seconds:g} seconds: "
            f"{listing(self.replicas)}"
        )


class Unavailable(ServiceError):
    """Base of the errors of a service that answers no request now."""


class NotReady(Unavailable):
    """Loading or warming up: try again soon."""


class LeaseExpired(Unavailable):
    """This replica cannot read the shared store's log, so it may not know the newest changes."""


class EngineUnavailable(Unavailable):
    """Draining, stopped or dead."""


def without_frames(error: E) -> E:
    """The error without what led to it: to be kept by something that these frames know, too. Such a
    circle would wait for the garbage collector."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
