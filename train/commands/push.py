"""`python -m train push`: publish an adapter file on a running service."""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from cli.flags import add_card
from cli.hints import command_line
from cli.imports import importing
from cli.shell import Command
from service.client import Busy, ClientError, Conflict, Published, Unreachable
from service.client.cards import CardFile, chosen_card, send_card
from service.client.environment import (
    API_KEY_VARIABLE,
    DEFAULT_URL,
    URL_VARIABLE,
    api_key,
    ca_file,
    service_url,
)
from service.client.errors import InvalidCall, describe
from service.client.retry import ONCE
from service.client.types import Wait
from train.errors import PushError
from train.report.progress import LineProgress

if TYPE_CHECKING:
    from service.client import Client

T = TypeVar("T")

# The service checks and runs the adapter before it answers.
TIMEOUT_SECONDS = 120.0
ATTEMPTS = 5
MAX_WAIT_SECONDS = 30.0


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, type=Path, metavar="X.safetensors")
    parser.add_argument("--name", required=True, help="the name to serve it under")
    parser.add_argument(
        "--url",
        help=f"of the service; default: ${URL_VARIABLE}, else {DEFAULT_URL}, with $IDSPAM_PORT if "
        "that is set",
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"default: ${API_KEY_VARIABLE}")
    parser.add_argument(
        "--if-match", metavar="REVISION", help="publish only if this revision is served now"
    )
    parser.add_argument(
        "--force", action="store_true", help="also if the labels or the task change"
    )
    parser.add_argument(
        "--stage", action="store_true", help="store it, and go on serving the revision of now"
    )
    parser.add_argument(
        "--wait",
        choices=get_args(Wait),
        help="with a shared store: the replicas to wait for; default: all",
    )
    add_card(parser, file="the file")


def run(arguments: Namespace) -> int:
    try:
        url = service_url(arguments.url)
    except InvalidCall as error:
        raise PushError(str(error)) from None
    note, key = LineProgress(sys.stderr).note, api_key(arguments.api_key)
    try:
        card = chosen_card(
            arguments.adapter, named=arguments.card, leave_out=arguments.no_card, note=note
        )
    except InvalidCall as error:
        raise PushError(f"--card {error}") from None
    note(f"checking {arguments.adapter}, then sending it to {url}")
    published = push(
        arguments.adapter,
        arguments.name,
        url,
        key=key,
        if_match=arguments.if_match,
        force=arguments.force,
        stage=arguments.stage,
        wait=arguments.wait,
        note=note,
    )
    outcome = "staged" if arguments.stage else published.outcome
    sys.stdout.write(f"{published.name} {published.revision} {outcome}\n")
    if card is not None:
        push_card(card, published, url, key=key, note=note)
    return 0


COMMAND = Command("publish an adapter on a running service", run, add_arguments)


def push(
    path: Path,
    name: str,
    url: str,
    *,
    key: str | None = None,
    if_match: str | None = None,
    force: bool = False,
    stage: bool = False,
    wait: Wait | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Published:
    """Validate a file here, then publish exactly these bytes under a name.

    A service that is busy or not ready yet is asked again after the time that it names, `ATTEMPTS`
    times in all. Unlike the client's own retries, a missing service is reported at once.

    Args:
        url: where the service's paths begin: `http://host:8000`.
        if_match: publish only over this revision (compare-and-swap).
        force: replace an adapter also by one with other labels or another task.
        stage, wait: as of `Client.upload`.
        note: called before every wait.

    Raises:
        InvalidAdapter: the file is not an adapter; nothing was sent.
        PushError: refused, unreachable, or not this service.
        OSError: the file cannot be read.
    """
    with importing():
        from adapters.format.files import validate

    data = path.read_bytes()
    validate(data)
    revision = None if if_match is None else if_match.strip('"')
    try:
        with _client(url, key) as client:
            return _patiently(
                lambda: client.upload(
                    name, data, if_match=revision, force=force, stage=stage, wait=wait
                ),
                note,
            )
    except Conflict as error:
        raise PushError(f"{url}: {describe(error)}; someone else has published since") from None
    except Unreachable as error:
        start = command_line("service", "serve")
        raise PushError(f"{describe(error)}; `{start}` starts one, --url names another") from None
    except ClientError as error:
        raise PushError(f"{url}: {describe(error)}") from None


def push_card(
    card: CardFile,
    published: Published,
    url: str,
    *,
    key: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Keep a model card with what was published.

    Args:
        note: called with what became of the card, and before every wait.

    Raises:
        PushError: the card was named, and is not stored.
    """
    name, revision = published.name, published.revision

    def send(text: str) -> None:
        with _client(url, key) as client:
            _patiently(lambda: client.set_card(name, text, revision), note)

    try:
        send_card(card, send, note)
    except ClientError as error:
        raise PushError(
            f"{name} {revision[:12]} is published, but without its {card.shown}: {url}: "
            f"{describe(error)}"
        ) from None


def _client(url: str, key: str | None) -> "Client":
    from service.client import Client

    return Client(url, api_key=key, ca=ca_file(), seconds=TIMEOUT_SECONDS, retries=ONCE)


def _patiently(work: Callable[[], T], note: Callable[[str], None]) -> T:
    """Ask a busy service again, `ATTEMPTS` times in all.

    Raises:
        ClientError: of the last attempt.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except Busy as error:
            seconds = _wait(error, attempt)
            note(
                f"the service is busy ({error.status}), trying again in {seconds:g} s "
                f"({attempt} of {ATTEMPTS})"
            )
            time.sleep(seconds)
    return work()


def _wait(error: Busy, attempt: int) -> float:
    """Seconds: what the service says, else doubling; never longer than `MAX_WAIT_SECONDS`."""
    seconds = 2.0 ** (attempt - 1) if error.retry_after is None else error.retry_after
    return min(seconds, MAX_WAIT_SECONDS)
