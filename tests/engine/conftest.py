"""Fixtures of the engine's tests."""

from contextlib import AbstractAsyncContextManager

import pytest

from adapters.backbone.model import Backbone
from tests.support import residency_harness
from tests.support.residency_harness import OpenResidency, ResidencyHarness


@pytest.fixture(scope="module")
def open_residency(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> OpenResidency:
    """Opens a residency over a store of its own; takes the numbers of adapters by name."""

    def open_one(**numbers: int) -> AbstractAsyncContextManager[ResidencyHarness]:
        root = tmp_path_factory.mktemp("store")
        return residency_harness.open_residency(root, backbone, **numbers)

    return open_one
