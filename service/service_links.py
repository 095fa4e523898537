"""Variables that Kubernetes sets beside the settings.

Kubernetes tells every container where the services of its namespace are, in variables named after
them (`enableServiceLinks`, on by default). A service that is called `idspam` or `idspam-...` so
sets variables with the prefix of our settings, such as `IDSPAM_PORT=tcp://10.0.0.1:8000`.
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

_PROTOCOLS = ("tcp", "udp", "sctp")
_URL = re.compile(r"[A-Z0-9_]+_PORT(_\d+_(TCP|UDP|SCTP))?")
_ADDRESS = re.compile(r"[A-Z0-9_]+_(SERVICE_HOST|PORT_\d+_(TCP|UDP|SCTP)_ADDR)")
_NUMBER = re.compile(r"[A-Z0-9_]+_(SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)_PORT)")
_PROTOCOL = re.compile(r"[A-Z0-9_]+_PORT_\d+_(TCP|UDP|SCTP)_PROTO")


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable has both the name and the value of a service link.

    A wrong setting is none: `IDSPAM_PORT=tcp` has no address, and `IDSPAM_SERVICE_HOST=0.0.0.0`
    has one that no service of a cluster can have.
    """
    return (
        bool(_URL.fullmatch(name) and _is_url(value))
        or bool(_ADDRESS.fullmatch(name) and _is_address(value))
        or bool(_NUMBER.fullmatch(name) and _is_port(value))
        or bool(_PROTOCOL.fullmatch(name) and value in _PROTOCOLS)
    )


def service_links(environ: Mapping[str, str], prefix: str) -> list[str]:
    """The names of an environment's service links that begin with a prefix, sorted."""
    return sorted(
        name
        for name, value in environ.items()
        if name.startswith(prefix) and is_service_link(name, value)
    )


def _is_url(value: str) -> bool:
    try:
        url = urlsplit(value)
        return (
            url.scheme in _PROTOCOLS
            and url.port is not None
            and _is_address(url.hostname or "")
            and not (url.path or url.query or url.fragment or url.username)
        )
    except ValueError:
        return False


def _is_address(value: str) -> bool:
    try:
        address = ip_address(value)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback or address.is_multicast)


def _is_port(value: str) -> bool:
    return value.isascii() and value.isdigit() and 0 < int(value[:6]) <= 65535
