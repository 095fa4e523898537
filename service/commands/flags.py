"""Flags that several commands have, and the client that they describe."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING, Any, cast, get_args

from service.client.environment import (
    API_KEY_VARIABLE,
    DEFAULT_URL,
    URL_VARIABLE,
    api_key,
    ca_file,
    service_url,
)
from service.client.types import Explain, Wait

if TYPE_CHECKING:
    from service.client import Client
    from service.client.types import Options

OF_URL = f"default: ${URL_VARIABLE}, else {DEFAULT_URL}, with $IDSPAM_PORT if that is set"


def add_service(parser: ArgumentParser) -> None:
    """`--url` and `--api-key`."""
    parser.add_argument("--url", help=f"of the service; {OF_URL}")
    add_key(parser)


def add_key(parser: ArgumentParser) -> None:
    """`--api-key`."""
    parser.add_argument("--api-key", metavar="KEY", help=f"default: ${API_KEY_VARIABLE}")


def add_wait(parser: ArgumentParser) -> None:
    """`--wait`, of commands that change what is served."""
    parser.add_argument(
        "--wait",
        choices=get_args(Wait),
        help="with a shared store: the replicas to wait for; default: all",
    )


def add_answers(parser: ArgumentParser, *, no_truncate: str) -> None:
    """What answers have. no_truncate: what that flag does."""
    answers = parser.add_argument_group("answers")
    answers.add_argument("--top-k", type=count, metavar="N", help="labels to give; default: all")
    answers.add_argument(
        "--explain",
        nargs="?",
        const="attention",
        type=explain,
        metavar="KIND",
        help="attention: what each word was to the prompt; occlusion: what the score loses without "
        "each word, which reads a text once more for every word; default: attention",
    )
    answers.add_argument(
        "--no-truncate",
        action="store_true",
        help=no_truncate,
    )
    answers.add_argument(
        "--abstain-below",
        type=share,
        metavar="X",
        help="a lower best score is marked `abstained`; default: what the adapter's file says",
    )


def options_of(arguments: Namespace) -> "Options":
    """The options that the flags of `add_answers` say."""
    options: Options = {"truncate": not arguments.no_truncate}
    if arguments.explain is not None:
        options["explain"] = arguments.explain
    if arguments.top_k is not None:
        options["top_k"] = arguments.top_k
    if arguments.abstain_below is not None:
        options["abstain_below"] = arguments.abstain_below
    return options


def client_of(arguments: Namespace, **options: Any) -> "Client":
    """A client of the service that the flags of `add_service` name. options: as of `Client`.

    Raises:
        InvalidCall: the address or the key cannot be used.
    """
    from service.client import Client

    url = service_url(arguments.url)
    return Client(url, api_key=api_key(arguments.api_key), ca=ca_file(), **options)


def positive_seconds(value: str) -> float:
    """Parses a number of seconds."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 86400.0:
        raise ArgumentTypeError(f"{value!r}: expected seconds, more than 0 and at most a day")
    return number


def share(value: str) -> float:
    """Parses a number from 0 to 1."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise ArgumentTypeError(f"{value!r}: expected a number from 0 to 1")
    return number


def explain(value: str) -> Explain:
    """Parses a kind of explanation."""
    for kind in get_args(Explain):
        if value == kind:
            return cast(Explain, kind)
    raise ArgumentTypeError(
        f"{value!r}: expected {' or '.join(get_args(Explain))}; a file goes before --explain"
    )


def count(value: str) -> int:
    """Parses a whole number from 1."""
    if not (value.isascii() and value.isdecimal()) or not 1 <= int(value[:9]) <= 100_000:
        raise ArgumentTypeError(f"{value!r}: expected a whole number from 1 to 100000")
    return int(value[:9])
