"""A service without keys is for this machine alone, unless its settings say otherwise."""

import ipaddress
import logging
import socket
from typing import Literal, TypeAlias

from cli.hints import command_line
from service.settings import Settings

logger = logging.getLogger(__name__)


def ways_out() -> str:
    """Half a sentence for the user."""
    create = command_line(
        "service", "keys", "create", "admin", "--scopes", "all", "--file", "keys.jsonl"
    )
    return (
        f"set IDSPAM_KEYS_FILE=keys.jsonl (`{create}` writes it), or IDSPAM_HOST=127.0.0.1, or "
        "IDSPAM_PUBLISHED=127.0.0.1 in a container whose port is published there, or "
        "IDSPAM_OPEN=yes"
    )


class Exposed(Exception):
    """A service without keys would listen where others can reach it. The text has the ways out."""


def has_keys(settings: Settings) -> bool:
    """Whether requests need a key."""
    return bool(settings.keys_file or settings.keys or settings.api_keys or settings.admin_keys)


def refuse_exposed(settings: Settings) -> None:
    """
    Raises:
        Exposed: no keys, an address that is not this machine's own, and no `IDSPAM_OPEN=yes`.
    """
    if has_keys(settings) or settings.open or is_loopback(settings.published or settings.host):
        return
    name = "IDSPAM_PUBLISHED" if settings.published else "IDSPAM_HOST"
    address = settings.published or settings.host
    raise Exposed(f"{name}={address} without keys lets everybody in: {ways_out()}")


Access: TypeAlias = Literal["keys", "loopback", "open"]


def access_of(settings: Settings) -> Access:
    """Who may ask a service with these settings."""
    if has_keys(settings):
        return "keys"
    return "loopback" if is_loopback(settings.published or settings.host) else "open"


def log_access(settings: Settings) -> None:
    """Say in the log who may ask this service."""
    address = settings.published or settings.host
    match access_of(settings):
        case "keys":
            logger.info("access=keys every request needs a key, but for probes and documentation")
        case "loopback":
            logger.info("access=loopback no keys: only this machine can ask (%s)", address)
        case "open":
            logger.warning(
                "access=open THERE ARE NO KEYS: everybody who reaches %s may do everything", address
            )


def is_loopback(host: str) -> bool:
    """Whether every address of a host is this machine's own. A name that has none is not."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = [str(address[0]).partition("%")[0] for *_, address in found]
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)
