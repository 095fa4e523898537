"""Fixtures of the tests over HTTP."""

import pytest


@pytest.fixture(scope="module")
def tokens() -> dict[str, str]:
    """The tokens of a module's keys by name: its service fills it when it starts."""
    return {}
