"""Which scope each route needs: one table of methods and path templates.

What is not in this table reaches no route, with or without keys. A new route adds its row here.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias, get_args

Scope: TypeAlias = Literal["predict", "adapters:read", "adapters:write", "metrics", "texts"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
# `probe` and `open` need no key; `key` needs any valid one.
Access: TypeAlias = Scope | Literal["probe", "open", "key", "predict or adapters:read"]


class Need(NamedTuple):
    """What a route needs. scopes: any one of them is enough; if there are none, any key is."""

    is_open: bool
    is_probe: bool
    scopes: frozenset[Scope]

    @property
    def changes_adapters(self) -> bool:
        return "adapters:write" in self.scopes


class Match(NamedTuple):
    """A route that a request asks for. adapter: the name in its path, without a revision."""

    need: Need
    adapter: str | None


_TABLE: tuple[tuple[Access, str, str], ...] = (
    # Answered while the service loads, drains or fails, to whoever asks, under any `Host`.
    ("probe", "GET", "/healthz"),
    ("probe", "GET", "/readyz"),
    ("probe", "GET", "/health"),
    ("probe", "GET", "/ping"),
    ("probe", "GET", "/v2/health/live"),
    ("probe", "GET", "/v2/health/ready"),
    ("open", "GET", "/docs"),
    ("open", "GET", "/docs/start.js"),
    ("open", "GET", "/docs/swagger-ui-bundle.js"),
    ("open", "GET", "/docs/swagger-ui.css"),
    ("open", "GET", "/docs/favicon.png"),
    ("open", "GET", "/openapi.json"),
    ("open", "GET", "/"),
    ("open", "GET", "/console"),
    ("open", "GET", "/console/{file}"),
    ("open", "GET", "/console/{folder}/{file}"),
    ("metrics", "GET", "/metrics"),
    ("predict", "POST", "/v1/predict"),
    ("predict", "POST", "/v1/predict/stream"),
    ("adapters:read", "GET", "/v1/adapters"),
    ("adapters:write", "POST", "/v1/adapters"),
    ("adapters:read", "GET", "/v1/adapters/{name}"),
    ("adapters:write", "PUT", "/v1/adapters/{name}"),
    ("adapters:write", "DELETE", "/v1/adapters/{name}"),
    ("adapters:read", "GET", "/v1/adapters/{name}/card"),
    ("adapters:write", "PUT", "/v1/adapters/{name}/card"),
    ("adapters:read", "GET", "/v1/adapters/{name}/difference"),
    ("adapters:read", "GET", "/v1/adapters/{name}/file"),
    ("adapters:write", "DELETE", "/v1/adapters/{name}/revisions/{revision}"),
    ("adapters:write", "POST", "/v1/adapters/{name}/rollback"),
    ("adapters:read", "GET", "/v1/adapters/{name}/traffic"),
    ("adapters:write", "PUT", "/v1/adapters/{name}/traffic"),
    ("adapters:write", "DELETE", "/v1/adapters/{name}/traffic"),
    ("adapters:write", "POST", "/v1/adapters/{name}/traffic/promote"),
    ("adapters:read", "GET", "/v1/adapters/{name}/drift"),
    # What others have sent: a scope of its own, which only a key that names it has.
    ("texts", "GET", "/v1/adapters/{name}/uncertain"),
    ("texts", "DELETE", "/v1/adapters/{name}/uncertain"),
    # Text Embeddings Inference. Its clients ask for the labels before they predict.
    ("predict", "POST", "/"),
    ("predict", "POST", "/predict"),
    ("predict", "POST", "/invocations"),
    ("predict", "POST", "/adapters/{name}"),
    ("predict", "POST", "/adapters/{name}/predict"),
    ("predict", "POST", "/embed"),
    ("predict", "POST", "/rerank"),
    ("predict", "POST", "/adapters/{name}/rerank"),
    ("predict or adapters:read", "GET", "/info"),
    ("predict or adapters:read", "GET", "/adapters/{name}/info"),
    ("predict or adapters:read", "GET", "/adapters/{name}/health"),
    # The Open Inference Protocol. Its clients ask for the tensors before they predict.
    ("key", "GET", "/v2"),
    ("adapters:read", "GET", "/v2/models"),
    ("predict or adapters:read", "GET", "/v2/models/{name}"),
    ("predict or adapters:read", "GET", "/v2/models/{name}/ready"),
    ("predict or adapters:read", "GET", "/v2/models/{name}/versions/{version}"),
    ("predict or adapters:read", "GET", "/v2/models/{name}/versions/{version}/ready"),
    ("predict", "POST", "/v2/models/{name}/infer"),
    ("predict", "POST", "/v2/models/{name}/versions/{version}/infer"),
    ("adapters:read", "POST", "/v2/repository/index"),
    ("adapters:write", "POST", "/v2/repository/models/{name}/load"),
    ("adapters:write", "POST", "/v2/repository/models/{name}/unload"),
    # vLLM.
    ("predict", "POST", "/classify"),
    ("predict", "POST", "/v1/rerank"),
    ("predict", "POST", "/v2/rerank"),
    # OpenAI.
    ("predict", "POST", "/v1/embeddings"),
)


def needs() -> Mapping[tuple[str, str], Need]:
    """What each route needs, by method and path template."""
    return _NEEDS


def match(method: str, path: str) -> Match | None:
    """The route that a method and a decoded path ask for; None if there is none.

    Paths are compared as the router compares them: case and slashes count.
    """
    need = _FIXED.get((method, path))
    if need is not None:
        return Match(need, None)
    segments = path.split("/")
    for template, need in _VARIABLE.get((method, len(segments)), ()):
        name = None
        for expected, segment in zip(template, segments, strict=True):
            if expected.startswith("{"):
                if not segment:
                    break
                if expected == "{name}":
                    name = segment.partition("@")[0]
            elif expected != segment:
                break
        else:
            return Match(need, name)
    return None


def methods_of(path: str) -> list[str]:
    """The methods that a path has; empty if there is no such path."""
    known = {method for _, method, _ in _TABLE}
    methods = {method for method in known if match(method, path) is not None}
    # The gate answers HEAD as GET.
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _need(access: Access) -> Need:
    if access in ("probe", "open"):
        return Need(is_open=True, is_probe=access == "probe", scopes=frozenset())
    wanted = access.split(" or ")
    return Need(
        is_open=False,
        is_probe=False,
        scopes=frozenset(scope for scope in SCOPES if scope in wanted),
    )


def _by_length() -> dict[tuple[str, int], list[tuple[list[str], Need]]]:
    found: dict[tuple[str, int], list[tuple[list[str], Need]]] = {}
    for (method, path), need in _NEEDS.items():
        if "{" in path:
            segments = path.split("/")
            found.setdefault((method, len(segments)), []).append((segments, need))
    return found


_NEEDS: Mapping[tuple[str, str], Need] = MappingProxyType(
    {(method, path): _need(access) for access, method, path in _TABLE}
)
_FIXED = {route: need for route, need in _NEEDS.items() if "{" not in route[1]}
_VARIABLE = _by_length()
