"""What a config file of Ray Serve says of this service."""

import socket
from typing import Any

import pytest
import yaml

from deploy.ray.config import (
    NAME,
    address_of,
    application_of,
    refuse_taken_address,
    replicas_at_start,
)
from service.start import StartFailed
from tests.support.service_process import TREE


def config(**deployment: Any) -> dict[str, Any]:
    return {"applications": [{"name": NAME, "deployments": [{"name": NAME, **deployment}]}]}


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (config(), 1),
        (config(num_replicas=3), 3),
        (config(num_replicas="auto"), 1),
        (config(autoscaling_config={"min_replicas": 2, "max_replicas": 8}), 2),
        (config(autoscaling_config={"min_replicas": 2, "initial_replicas": 4}), 4),
        (config(autoscaling_config={"min_replicas": 0, "max_replicas": 1}), 0),
        ({"applications": [{"name": NAME}]}, 1),
        ({"applications": [{"name": NAME, "deployments": [{"name": "other"}]}]}, 1),
        ({"applications": [{"name": "other"}, *config(num_replicas=5)["applications"]]}, 5),
    ],
)
def test_the_replicas_at_the_start_are_those_that_serve_starts(
    content: dict[str, Any], count: int
) -> None:
    assert replicas_at_start(content) == count


@pytest.mark.parametrize("content", [{}, {"applications": []}, {"applications": [{"name": "x"}]}])
def test_a_file_without_the_application_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(StartFailed, match="applications: none of them has the name idspam"):
        application_of(content)


def test_the_shipped_file_starts_one_replica_on_this_machine() -> None:
    content = yaml.safe_load((TREE / "deploy" / "ray" / "serve.yaml").read_text())
    assert replicas_at_start(content) == 1
    assert address_of(content) == ("127.0.0.1", 8000)
    assert address_of({}) == ("127.0.0.1", 8000)


def test_a_port_that_somebody_shares_is_taken_all_the_same() -> None:
    """Ray's proxies and others that set SO_REUSEPORT would both get connections."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartFailed, match=rf"cannot listen on 127\.0\.0\.1, port {port}"):
            refuse_taken_address("127.0.0.1", port)
    refuse_taken_address("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "named"),
    [
        ("127.0.0.1", 0, "http_options.port: 0: must be from 1 to 65535"),
        ("127.0.0.1", 70_000, "http_options.port: 70000"),
        ("127.0.0.1", -1, "http_options.port: -1"),
        ("192.0.2.1", 8000, "cannot listen on 192.0.2.1, port 8000"),
    ],
)
def test_an_address_that_is_none_is_named(host: str, port: int, named: str) -> None:
    with pytest.raises(StartFailed, match=named):
        refuse_taken_address(host, port)
