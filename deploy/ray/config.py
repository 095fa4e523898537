"""What a config file of Ray Serve says of this service. Imports neither Ray nor a model."""

import socket
from collections.abc import Mapping
from typing import Any

from service.start import StartFailed

# Of the application and of its only deployment.
NAME = "idspam"
_DEFAULT_HOST, _DEFAULT_PORT = "127.0.0.1", 8000
_MOST_PORT = 65_535


def application_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The service's application of a config that Serve's schema accepts.

    Raises:
        StartFailed: there is none of its name.
    """
    for application in config.get("applications") or ():
        if application.get("name") == NAME:
            return dict(application)
    raise StartFailed(f"applications: none of them has the name {NAME}")


def replicas_at_start(config: Mapping[str, Any]) -> int:
    """How many replicas Serve starts.

    Raises:
        StartFailed: as `application_of`.
    """
    for deployment in application_of(config).get("deployments") or ():
        if deployment.get("name") != NAME:
            continue
        count = deployment.get("num_replicas")
        scaling = deployment.get("autoscaling_config") or {}
        for number in (scaling.get("initial_replicas"), scaling.get("min_replicas")):
            if number is not None:
                return int(number)
        # `auto` is autoscaling with Serve's defaults, whose least is 1.
        return 1 if count is None or count == "auto" else int(count)
    return 1


def address_of(config: Mapping[str, Any]) -> tuple[str, int]:
    """Where Ray's proxies listen."""
    options = config.get("http_options") or {}
    host, port = options.get("host", _DEFAULT_HOST), options.get("port", _DEFAULT_PORT)
    return str(host), int(port)


def refuse_taken_address(host: str, port: int) -> None:
    """Ray's proxies share a port with other processes that allow it, and a proxy that cannot listen
    does not stop the deployment.

    Raises:
        StartFailed: nobody can listen there, or somebody does.
    """
    if not 0 < port <= _MOST_PORT:
        raise StartFailed(f"http_options.port: {port}: must be from 1 to {_MOST_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise StartFailed(
            f"http_options: cannot listen on {host}, port {port}: {error.strerror or error}"
        ) from None
