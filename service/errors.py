"""What the service refuses or fails at. Knows no HTTP: `service.http` has the table of statuses.

    ServiceError
    |-- RequestError              the caller can do something about it
    |   |-- MalformedRequest      the body cannot be parsed at all
    |   |-- InvalidRequest        it can be parsed, but not accepted; lists every fault
    |   |   `-- NoInputs          there is nothing to classify in it
    |   |-- TooLarge              the body, or the number of inputs
    |   |-- Unauthorized          no key, or an unknown one
    |   `-- Forbidden             a known key that may not do this
    |-- Overloaded                not admitted: waiting tokens at their limit; says when to retry
    |-- DeadlineExceeded          it waited longer than the caller allows
    |-- InferenceFailed           the batch failed, or the scores are not finite
    |-- AdapterLoadFailed         a registered adapter's file vanished, rotted or cannot be prepared
    `-- Unavailable               nothing is answered at the moment
        |-- NotReady              not yet: loading or warming up
        `-- EngineUnavailable     no longer: draining, stopped or dead

Besides these, `adapters.errors` reach the caller: unknown names, conflicts, invalid adapter files.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from adapters.errors import listing

InferenceFailure: TypeAlias = Literal["out_of_memory", "not_finite", "batch_error"]


class ServiceError(Exception):
    """Base of everything that a request can fail with."""


class RequestError(ServiceError):
    """Base of what is wrong with the request itself."""


class MalformedRequest(RequestError):
    """The body is not what its content type says."""


class InvalidRequest(RequestError):
    """The request can be read but not accepted; `details` names every fault."""

    def __init__(self, details: Sequence[str]) -> None:
        self.details = tuple(details)
        super().__init__(listing(self.details))


class NoInputs(InvalidRequest):
    """An empty list of inputs."""

    def __init__(self) -> None:
        super().__init__(["inputs: empty, expected at least one text"])


class TooLarge(RequestError):
    """The body or the number of inputs is over its limit."""


class Unauthorized(RequestError):
    """No key was given, or one that nobody has."""


class Forbidden(RequestError):
    """The key is known, but may not do this."""


class Overloaded(ServiceError):
    """Not admitted. `retry_after`: seconds until this much has drained, at the measured rate."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class DeadlineExceeded(ServiceError):
    """An entry waited past its request's deadline."""


class InferenceFailed(ServiceError):
    """The device failed on this request's rows, or their scores are not finite."""

    def __init__(self, message: str, *, reason: InferenceFailure = "batch_error") -> None:
        self.reason: InferenceFailure = reason
        super().__init__(message)


class AdapterLoadFailed(ServiceError):
    """A registered adapter cannot be made to run. Other adapters are not affected."""

    def __init__(self, name: str, revision: str, reason: str) -> None:
        self.name = name
        self.revision = revision
        super().__init__(f"adapter {name!r} ({revision[:12]}) cannot be loaded: {reason}")


class Unavailable(ServiceError):
    """Base of the states in which no request is answered."""


class NotReady(Unavailable):
    """Loading or warming up: try again soon."""


class EngineUnavailable(Unavailable):
    """Draining, stopped or dead."""
