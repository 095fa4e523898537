"""Which proxy a service is asked through: the environment's, except that loopback has none.

httpx reads the same variables, but raises errors of its own for some of their values, which name no
variable, and sends requests to this machine through a proxy, which cannot reach it.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address

# typeshed has the second one for macOS alone.
from urllib.request import (  # type: ignore[attr-defined]
    getproxies_environment,
    proxy_bypass_environment,
)

import httpx

from service.client.errors import InvalidCall

_SOCKS = ("socks5", "socks5h")
_SCHEMES = ("http", "https", *_SOCKS)


@dataclass(frozen=True, slots=True)
class Proxy:
    """variable: of the environment, that names the proxy. url: without its user and password."""

    variable: str
    url: str
    httpx: httpx.Proxy

    def __str__(self) -> str:
        return f"through the proxy {self.url} of {self.variable}"


def proxy_of(url: httpx.URL) -> Proxy | None:
    """The proxy for a service; None if it is asked directly.

    `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` have their usual meaning, in capitals or
    not.

    Raises:
        InvalidCall: a variable has a value that cannot be used, or needs a package.
    """
    if is_loopback(url.host):
        return None
    proxies = getproxies_environment()
    kind = url.scheme if proxies.get(url.scheme) else "all"
    value = proxies.get(kind)
    if not value or proxy_bypass_environment(url.host, _without_brackets(proxies)):
        return None
    lower = f"{kind}_proxy"
    variable = lower if os.environ.get(lower) else lower.upper()
    try:
        parsed = httpx.URL(value if "://" in value else f"http://{value}")
        port = parsed.port
    except httpx.InvalidURL as error:
        raise InvalidCall(f"{variable}: {value!r} is no address of a proxy: {error}") from None
    shown = f"{parsed.scheme}://{parsed.host}" + (f":{port}" if port else "")
    if parsed.scheme not in _SCHEMES or not parsed.host:
        raise InvalidCall(f"{variable}: {shown!r} is no address of a proxy: expected http://host")
    if parsed.scheme in _SOCKS and find_spec("socksio") is None:
        raise InvalidCall(
            f"{variable}: the proxy {shown} needs the package socksio (pip install socksio); "
            f"NO_PROXY={url.host} asks the service directly"
        )
    return Proxy(variable, shown, httpx.Proxy(parsed))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    # 0.0.0.0 and :: are this machine as well when they are asked.
    return address.is_loopback or address.is_unspecified


def _without_brackets(proxies: dict[str, str]) -> dict[str, str]:
    """`NO_PROXY=[::1]` as `NO_PROXY=::1`, which is how addresses are compared."""
    names = [name.strip() for name in proxies.get("no", "").split(",")]
    plain = [name[1:-1] if name.startswith("[") and name.endswith("]") else name for name in names]
    return proxies | {"no": ",".join(plain)} if plain != [""] else proxies
