"""Stores that replicas may share: a folder, and S3 as moto's server in a process of its own."""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.shared.objects import ObjectStore
from tests.support.s3_server import BUCKET, environment, s3_server
from tests.support.tcp_proxy import Proxy, proxy_to

# Seconds. The first call loads the library of S3, for seconds on a busy machine.
TIMEOUT = 15.0


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[Proxy]:
    """In front of an S3 server; what a test breaks it must mend."""
    with s3_server() as endpoint, proxy_to(endpoint) as proxy:
        yield proxy


@pytest.fixture
def s3_url(s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix on that server."""
    for name, value in environment(s3_proxy.url).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{secrets.token_hex(8)}"


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], ObjectStore]:
    """Opens an empty store as another replica would, any number of times."""
    url = str(tmp_path / "shared")
    if request.param == "s3":
        url = request.getfixturevalue("s3_url")
    return lambda: ObjectStore(url, timeout=TIMEOUT)


@pytest.fixture
def store(new_store: Callable[[], ObjectStore]) -> ObjectStore:
    return new_store()
