"""A service with two adapters that the commands ask."""

from collections.abc import Iterator

import pytest

from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        running.put("a", make_adapter(make_backbone()))
        running.put("b", make_adapter(make_backbone(), seed=1, labels=("x", "y", "z")))
        yield running
