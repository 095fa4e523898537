"""Where the commands find their service: the flags, else the variables of the environment.

`ID_SPAM_URL`, `ID_SPAM_API_KEY` and `ID_SPAM_CA` are of clients alone: `IDSPAM_*` are settings of
the service, which refuses to start with an unknown one. Without a URL, the service is asked that a
`serve` with this environment starts: `IDSPAM_PORT`, `IDSPAM_HOST` and `IDSPAM_TLS_CERT` say where.
"""

import os
from collections.abc import Mapping
from ipaddress import ip_address

from service.client.errors import InvalidCall

URL_VARIABLE = "ID_SPAM_URL"
API_KEY_VARIABLE = "ID_SPAM_API_KEY"
CA_VARIABLE = "ID_SPAM_CA"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
DEFAULT_URL = f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"


def service_url(flag: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """The address of a `--url` flag, or else of the environment.

    Raises:
        InvalidCall: `IDSPAM_PORT` tells no port.
    """
    if url := flag or environ.get(URL_VARIABLE, "").strip():
        return url.rstrip("/")
    scheme = "https" if environ.get("IDSPAM_TLS_CERT", "").strip() else "http"
    return f"{scheme}://{_host(environ)}:{_port(environ)}"


def api_key(flag: str | None) -> str | None:
    """The key of a `--api-key` flag, or else of the environment."""
    return flag or os.environ.get(API_KEY_VARIABLE) or None


def ca_file(flag: str | None = None) -> str | None:
    """The certificate authorities of a `--ca` flag, or else of the environment."""
    return flag or os.environ.get(CA_VARIABLE) or None


def from_environment(
    url: str | None, key: str | None, ca: str | None
) -> tuple[str, str | None, str | None]:
    """Address, key and certificate authorities of a client. A key of the environment goes to the
    address of the environment alone."""
    if url is not None:
        return url, key, ca
    return service_url(), api_key(key), ca_file(ca)


def _host(environ: Mapping[str, str]) -> str:
    """An address that reaches a service which listens on `IDSPAM_HOST`."""
    host = environ.get("IDSPAM_HOST", "").strip()
    try:
        address = ip_address(host)
    except ValueError:
        # A name, or nothing.
        return host or DEFAULT_HOST
    if address.is_unspecified:
        return DEFAULT_HOST
    return f"[{address}]" if address.version == 6 else host


def _port(environ: Mapping[str, str]) -> int:
    """
    Raises:
        InvalidCall: it is none, or 0, which takes a free one.
    """
    value = environ.get("IDSPAM_PORT", "").strip().replace("_", "")
    # Kubernetes sets it to an address if a service of the namespace is called `idspam`.
    if not value or "://" in value:
        return DEFAULT_PORT
    number = int(value) if value.isascii() and value.isdecimal() and len(value) <= 5 else 0
    if not 1 <= number <= 65535:
        raise InvalidCall(f"IDSPAM_PORT={value[:40]} is no port of a service: give --url")
    return number
