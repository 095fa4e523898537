"""Upload an adapter file to a running service. Knows the service's HTTP contract, not its code."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from adapters.format.files import validate
from adapters.format.store import NAME
from train.errors import PushError

# Connecting is quick or fails; the service checks and runs the adapter before it answers.
TIMEOUT = httpx.Timeout(120.0, connect=10.0)
ATTEMPTS = 5
MAX_WAIT_SECONDS = 30.0

_TRY_AGAIN = (429, 503)
_HINTS = {
    401: "give --api-key",
    403: "give an --api-key that may change adapters",
    404: "is this the service's address?",
    405: "is this the service's address?",
    412: "someone else has published since",
}


@dataclass(frozen=True, slots=True)
class Pushed:
    """What the service serves now. outcome: `created`, `replaced` or `unchanged`."""

    name: str
    revision: str
    outcome: str


def push(
    path: Path,
    name: str,
    url: str,
    *,
    api_key: str | None = None,
    if_match: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Pushed:
    """Validate a file here, then publish exactly these bytes under a name.

    A service that is busy or not ready yet is asked again, `ATTEMPTS` times in all, after the time
    that it names.

    Args:
        url: where the service's paths begin: `http://host:8000`.
        if_match: publish only over this revision (compare-and-swap).
        note: told before every wait.

    Raises:
        InvalidAdapter: the file is not an adapter; nothing was sent.
        PushError: refused, unreachable, or not this service.
        OSError: the file cannot be read.
    """
    if not NAME.fullmatch(name):
        raise PushError(
            f"name {name!r}: expected 1 to 64 of a-z 0-9 . _ -, a letter or digit first"
        )
    data = path.read_bytes()
    validate(data)
    request = _request(data, name, url, api_key=api_key, if_match=if_match)
    pushed = _published(_send(request, note), request.url)
    if pushed.revision != hashlib.sha256(data).hexdigest():
        raise PushError(f"{request.url} answers with revision {pushed.revision}, not this file's")
    return pushed


def _request(
    data: bytes, name: str, url: str, *, api_key: str | None, if_match: str | None
) -> httpx.Request:
    headers = {"Content-Type": "application/octet-stream"}
    for header, value in {
        "Authorization": api_key and f"Bearer {api_key}",
        "If-Match": if_match and f'"{if_match.strip(chr(34))}"',
    }.items():
        if value is None:
            continue
        if not (value.isascii() and value.isprintable()):
            raise PushError("keys and revisions are printable ASCII")
        headers[header] = value
    try:
        address = httpx.URL(f"{url.rstrip('/')}/v1/adapters/{quote(name, safe='')}")
    except httpx.InvalidURL as error:
        raise PushError(f"--url {url!r}: {error}") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise PushError(f"--url {url!r}: expected http://host:port")
    return httpx.Request("PUT", address, content=data, headers=headers)


def _send(request: httpx.Request, note: Callable[[str], None]) -> httpx.Response:
    with httpx.Client(timeout=TIMEOUT) as client:
        for attempt in range(1, ATTEMPTS + 1):
            # A client that sends a prepared request does not add its timeouts.
            request.extensions["timeout"] = TIMEOUT.as_dict()
            try:
                response = client.send(request)
            except httpx.ConnectError as error:
                raise PushError(f"no service answers at {request.url}: {error}") from None
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                raise PushError(f"{request.url} did not answer: {reason}") from None
            if response.status_code not in _TRY_AGAIN or attempt == ATTEMPTS:
                return response
            wait = _wait(response, attempt)
            note(
                f"the service is busy ({response.status_code}), trying again in {wait:g} s "
                f"({attempt} of {ATTEMPTS})"
            )
            time.sleep(wait)
    raise AssertionError("the last attempt returns")


def _wait(response: httpx.Response, attempt: int) -> float:
    """Seconds: what the service says, else doubling; never longer than `MAX_WAIT_SECONDS`."""
    said = response.headers.get("retry-after", "")
    seconds = float(said) if said.isascii() and said.isdecimal() else 2.0 ** (attempt - 1)
    return min(seconds, MAX_WAIT_SECONDS)


def _published(response: httpx.Response, url: httpx.URL) -> Pushed:
    content = _json(response)
    if not response.is_success:
        raise PushError(f"{url}: {_complaint(response, content)}")
    name, revision = content.get("name"), content.get("revision")
    if not (isinstance(name, str) and isinstance(revision, str)):
        raise PushError(f"{url} answered {response.status_code}, but not as this service does")
    changed = "replaced" if content.get("changed") else "unchanged"
    return Pushed(name, revision, "created" if content.get("created") else changed)


def _complaint(response: httpx.Response, content: dict[str, Any]) -> str:
    """Status, type, message, and each detail that the message does not already hold."""
    error = content.get("error")
    if not isinstance(error, dict):
        error = {}
    message = str(error.get("message", response.reason_phrase))
    details = error.get("details")
    listed = [str(item) for item in details] if isinstance(details, list) else []
    parts = [message, *(item for item in listed if item not in message)]
    if (hint := _HINTS.get(response.status_code)) is not None:
        parts.append(hint)
    kind = f" {error['type']}" if "type" in error else ""
    return f"{response.status_code}{kind}: {'; '.join(parts)}"


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
