"""What commands have in common: which service is asked, and what its refusals are called.

The client is imported only when it is made: it is not needed to find a flag unusable.
"""

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.client import Client, ClientError, Retries

URL = "http://127.0.0.1:8000"
# Not IDSPAM_*: those are settings of the service, and it stops at unknown ones.
API_KEY_VARIABLE = "ID_SPAM_API_KEY"

_HINTS = {401: "give --api-key", 403: "give an --api-key that may change adapters"}
# The service's own 404s have other types.
_ELSEWHERE = ("", "not_found", "method_not_allowed")
_SHOWN_DETAILS = 20


def add_service(parser: ArgumentParser) -> None:
    """`--url`, `--api-key`."""
    parser.add_argument("--url", default=URL, help="of the service; default: %(default)s")
    parser.add_argument("--api-key", metavar="KEY", help=f"default: ${API_KEY_VARIABLE}")


def client_of(
    arguments: Namespace, *, retries: "Retries | None" = None, connections: int = 16
) -> "Client":
    """A client of the service that the flags of `add_service` name.

    Raises:
        InvalidCall: they name none.
    """
    from service.client import Client

    key = arguments.api_key or os.environ.get(API_KEY_VARIABLE) or None
    return Client(arguments.url, api_key=key, retries=retries, connections=connections)


def words_of(error: "ClientError") -> str:
    """What went wrong: status, type, message, each detail that the message does not already hold,
    and what helps."""
    from service.client import Refused

    if not isinstance(error, Refused):
        return str(error)
    details = [item for item in error.details if item not in error.message]
    parts = [str(error), *details[:_SHOWN_DETAILS]]
    if hint := _HINTS.get(error.status):
        parts.append(hint)
    elif error.status < 500 and error.type in _ELSEWHERE:
        parts.append("is this the service's address?")
    return "; ".join(parts)


def positive_seconds(value: str) -> float:
    """A flag's number of seconds."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 86400.0:
        raise ArgumentTypeError(f"{value!r}: expected seconds, more than 0 and at most a day")
    return number


def count(value: str) -> int:
    """A flag's whole number from 1 on."""
    if not (value.isascii() and value.isdecimal()) or not 1 <= int(value[:9]) <= 100_000:
        raise ArgumentTypeError(f"{value!r}: expected a whole number from 1 to 100000")
    return int(value[:9])
