"""What a proxy in front of the service says: the prefix of its paths, and the real client.

`X-Forwarded-For`, `-Proto` and `-Prefix` count only if they come from a trusted proxy: everybody
else could pretend to be any client.
"""

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

_ROOT_PATH = "idspam.root_path"
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_LONGEST_PREFIX = 256


class BehindProxy:
    """ASGI middleware outside of everything else; without proxies it is left out.

    uvicorn's own middleware reads `X-Forwarded-For` and `X-Forwarded-Proto`.

    Args:
        root_path: the prefix under which clients see the service; "" for none.
        trusted: addresses and networks of proxies.
    """

    def __init__(self, app: ASGIApp, root_path: str, trusted: Sequence[str]) -> None:
        self._root_path = root_path
        self._app = ProxyHeadersMiddleware(app, trusted_hosts=list(trusted))  # type: ignore[arg-type]  # uvicorn's own types of ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "client": _plain_client(scope.get("client"))}
            scope[_ROOT_PATH] = self._prefix(scope)
            _strip(scope, self._root_path)
        await self._app(scope, receive, send)  # type: ignore[arg-type]  # uvicorn's own types

    def _prefix(self, scope: Scope) -> str:
        client = scope["client"]
        if client is None or client[0] not in self._app.trusted_hosts:
            return self._root_path
        values = [value for name, value in scope["headers"] if name == b"x-forwarded-prefix"]
        # Each proxy adds the prefix that it took off.
        parts = [part.strip().rstrip("/") for part in b",".join(values).decode("latin1").split(",")]
        prefix = "".join(parts)
        is_path = len(prefix) <= _LONGEST_PREFIX and _PREFIX.fullmatch(prefix)
        return prefix if is_path and "/.." not in prefix else self._root_path


def root_path_of(scope: Scope) -> str:
    """The prefix under which the sender of a request sees the service; "" if there is none."""
    root_path: str = scope.get(_ROOT_PATH, "")
    return root_path


def taken_by_a_route(root_path: str, paths: Iterable[str]) -> bool:
    """Whether some path of the service begins like a prefix, which could not be told from it."""
    return root_path.split("/")[1] in {path.split("/")[1] for path in paths}


def _strip(scope: Scope, root_path: str) -> None:
    """Take the prefix off a path, for proxies that leave it there."""
    path: str = scope["path"]
    if root_path and path.startswith(f"{root_path}/"):
        scope["path"] = path.removeprefix(root_path)
        raw: bytes = scope.get("raw_path") or b""
        scope["raw_path"] = raw.removeprefix(root_path.encode())


def _plain_client(client: tuple[str, int] | None) -> tuple[str, int] | None:
    """An address of IPv4 as such: a socket for both families shows it as one of IPv6."""
    if client is None or not client[0].startswith("::ffff:"):
        return client
    address = ip_address(client[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (str(mapped), client[1]) if mapped else client
