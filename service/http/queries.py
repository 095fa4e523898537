"""Query parameters of routes that change something: one that the route does not have is refused.

A misspelt `dry_run` would publish the file. Routes that only read ignore what they do not know.
"""

from collections.abc import Collection

from fastapi.routing import APIRoute
from starlette.requests import Request

from adapters.errors import listing
from service.errors import InvalidRequest

_READING = frozenset({"GET", "HEAD"})


def refuse_unknown_query(request: Request) -> None:
    """For a router's dependencies: the parameters are those of the route.

    Raises:
        InvalidRequest: as `refuse_query_but`.
    """
    if request.method not in _READING:
        route = request.scope["route"]
        assert isinstance(route, APIRoute)
        refuse_query_but(request, {field.alias for field in route.dependant.query_params})


def refuse_query_but(request: Request, known: Collection[str] = ()) -> None:
    """
    Raises:
        InvalidRequest: a parameter is not known, or is given twice.
    """
    if not request.scope["query_string"]:
        return
    given = [name for name, _ in request.query_params.multi_items()]
    there_are = f"there are {listing(sorted(known))}" if known else "there are none here"
    faults = [
        f"query: {name[:64]!r} is no parameter of this route, {there_are}"
        if name not in known
        else f"query: {name!r} is given {given.count(name)} times"
        for name in dict.fromkeys(given)
        if name not in known or given.count(name) > 1
    ]
    if faults:
        raise InvalidRequest(faults)
