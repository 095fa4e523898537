"""What a web page of another origin may do: nothing, unless the settings name its origin.

A browser on a machine that reaches the service sends what any page asks it to. Two headers tell:
`Origin` names the page that sends a form or a script's request. `Host` is the name under which the
page reached this service: a page that makes its own name point here (DNS rebinding) has its own
name there, and to the browser is of one origin with the service.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from service.errors import Forbidden

_DEFAULT_PORTS = {"http": "80", "https": "443"}
# Accepted values of `Host` are remembered, since all requests of a client have the same.
_REMEMBERED = 1000


class KnownHosts:
    """The names under which a service without keys answers.

    Args:
        allowed: names, also `*.example.org` for every name below; `*` is any name.
    """

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._any = "*" in allowed
        self._names = {name for name in allowed if not name.startswith("*")}
        suffixes = [name[1:] for name in allowed if name.startswith("*.")]
        self._suffixes = (".localhost", *suffixes)
        self._accepted: set[str] = set()

    def check(self, host: str | None) -> None:
        """
        Args:
            host: a `Host` header; None is a client older than HTTP/1.1, and no browser.

        Raises:
            Forbidden: not one of these names.
        """
        if self._any or not host or host in self._accepted:
            return
        name, _ = _split(host)
        # The name of a page that anybody could have made has a dot.
        is_local = "." not in name or _is_address(name)
        if not (is_local or name in self._names or name.endswith(self._suffixes)):
            raise Forbidden(
                f"the service has no keys and does not know the name {name[:80]!r} in `Host`: "
                "ask an address or a name without a dot, or set IDSPAM_ALLOWED_HOSTS"
            )
        if len(self._accepted) < _REMEMBERED:
            self._accepted.add(host)


class KnownOrigins:
    """The origins whose pages may do more than read.

    Args:
        allowed: as browsers write them (`https://example.org`); `*` is any origin.
    """

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._any = "*" in allowed
        self._allowed = frozenset(allowed)

    def check(self, headers: Mapping[str, str]) -> None:
        """
        Raises:
            Forbidden: a browser sends this for a page of another origin.
        """
        origin = headers.get("origin")
        if origin is None:
            # Browsers send `Origin` with every form; this is for one that would not.
            if headers.get("sec-fetch-site") == "cross-site" and not self._any:
                raise Forbidden("a web page of another origin may not do this")
            return
        if self._any or origin in self._allowed or _is_same(origin, headers.get("host", "")):
            return
        raise Forbidden(
            f"a web page of {origin[:80]!r} may not do this: IDSPAM_ALLOWED_ORIGINS names "
            "the origins that may"
        )


def _is_same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    if default is None or not parts.netloc or parts.path:
        return False
    name, port = _split(parts.netloc)
    asked, asked_port = _split(host)
    return (name, port or default) == (asked, asked_port or default)


def _split(host: str) -> tuple[str, str]:
    """Name and port; the name without brackets, in lower case, without the root's dot."""
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
        return name.lower(), rest.removeprefix(":")
    name, _, port = host.partition(":")
    return name.lower().removesuffix("."), port


def _is_address(name: str) -> bool:
    """A page cannot make an address point elsewhere."""
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
