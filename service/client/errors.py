"""The errors of a call.

ClientError
|-- InvalidCall             nothing was sent: an unusable address, key, name or number
|-- Closed                  the client was closed
|-- Unreachable             no connection, or it broke, or no answer came in time
|-- UnexpectedAnswer        not an answer of this service, or not a complete one
`-- Refused                 the service's own error: status, type, message, details, request_id
    |-- Rejected            4xx: the same call would be refused again
    |   |-- NotAllowed      401, 403: no key, an unknown, expired or revoked one (`type` says),
|   |                   or one without this permission
    |   |-- NotFound        404: no such adapter or revision; `details` names those that exist
    |   `-- Conflict        412: a condition does not hold
    |-- Busy                429, 503: not now; `retry_after` says when, if the service did
    `-- Failed              5xx: the service failed, or (504) was not in time
"""

from collections.abc import Sequence

# By the error's type.
_HINTS = {
    "unauthorized": "give --api-key, or set ID_SPAM_API_KEY",
    "key_expired": "ask for a new key",
    "replacement_not_forced": "--force does",
}
# Error types that suggest a wrong address; the 404 of an unknown adapter has another.
_ELSEWHERE = ("not_found", "method_not_allowed")
_SHOWN_DETAILS = 20


class ClientError(Exception):
    """Base of every error of a call."""


class InvalidCall(ClientError, ValueError):
    """Nothing was sent: an argument cannot be used."""


class Closed(ClientError):
    """The client was closed and cannot be used again."""


class Unreachable(ClientError):
    """No service answers, or the connection broke. The message names the address."""


class UnexpectedAnswer(ClientError):
    """The answer is not one of this service's, or not complete."""


class Refused(ClientError):
    """The service answered with an error.

    type: for programs; "" if it came from another server, such as a proxy. request_id: finds the
    request in the service's log.
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
    """No key was given, or an unknown one (`type` is unauthorized), one that is key_expired or
    key_revoked, or one without this permission (forbidden)."""


class NotFound(Rejected):
    """No such adapter or revision; `details` names those that exist."""


class Conflict(Rejected):
    """`if_match` or `if_none_match` does not hold."""


class Busy(Refused):
    """Not now: too much is waiting, the key's quota is used up, or the service is starting or
    stopping."""


class Failed(Refused):
    """The service failed, or did not answer within `timeout_ms`."""


def refusal_of(status: int) -> type[Refused]:
    """The class of the error with this status."""
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


def describe(error: ClientError) -> str:
    """An error as one line for the user of a command: message, further details, and a hint."""
    if not isinstance(error, Refused):
        return str(error)
    details = [detail for detail in error.details if detail not in error.message]
    parts = [str(error), *details[:_SHOWN_DETAILS]]
    if not error.type:
        parts.append("not the service's answer: is this its address, or does a proxy refuse?")
    elif hint := _HINTS.get(error.type):
        parts.append(hint)
    elif error.status < 500 and error.type in _ELSEWHERE:
        parts.append("is this the service's address?")
    return "; ".join(parts)
