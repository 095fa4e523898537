"""What a call can fail with. Knows no HTTP library.

ClientError
|-- InvalidCall             cannot be sent: an address, key, name or number that is none
|-- Closed                  the client was closed
|-- Unreachable             no connection, or it broke, or no answer came in time
|-- UnexpectedAnswer        an answer, but not as this service gives them
`-- Refused                 the service's own error: status, type, message, details, request_id
    |-- Rejected            4xx: the same call would be refused again
    |   |-- NotAllowed      401, 403: no key, an unknown one, or one that may not do this
    |   |-- NotFound        404: no such adapter or revision; `details` names those that exist
    |   `-- Conflict        412: a condition does not hold
    |-- Busy                429, 503: not now; `retry_after` says when, if the service did
    `-- Failed              5xx: the service could not do it, or (504) not in time
"""

from collections.abc import Sequence


class ClientError(Exception):
    """Base of everything that a call fails with."""


class InvalidCall(ClientError, ValueError):
    """Nothing was sent: what was asked for cannot be."""


class Closed(ClientError):
    """The client was closed; make another."""


class Unreachable(ClientError):
    """No service answers, or the connection broke. The message names the address."""


class UnexpectedAnswer(ClientError):
    """Something answered that is not this service, or not whole."""


class Refused(ClientError):
    """The service answered with an error.

    type: for programs; "" when whatever answered has none. request_id: what the service's log has
    it under.
    """

    def __init__(
        self,
        status: int,
        *,
        type: str,
        message: str,
        details: Sequence[str] = (),
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.status = status
        self.type = type
        self.message = message
        self.details = tuple(details)
        self.request_id = request_id
        self.retry_after = retry_after
        super().__init__(status, type, message)

    def __str__(self) -> str:
        kind = f"{self.status} {self.type}".rstrip()
        return f"{kind}: {self.message}"


class Rejected(Refused):
    """The request is at fault: repeating it does not help."""


class NotAllowed(Rejected):
    """No key was given, an unknown one, or one that may not do this."""


class NotFound(Rejected):
    """No such adapter or revision; `details` names those that exist."""


class Conflict(Rejected):
    """`if_match` or `if_none_match` does not hold."""


class Busy(Refused):
    """Not now: too much is waiting, or the service is starting or stopping."""


class Failed(Refused):
    """The service could not do it, or not within `timeout_ms`."""


def refusal_of(status: int) -> type[Refused]:
    """The class of an answer with this status."""
    match status:
        case 401 | 403:
            return NotAllowed
        case 404:
            return NotFound
        case 412:
            return Conflict
        case 429 | 503:
            return Busy
        case _:
            return Rejected if status < 500 else Failed
