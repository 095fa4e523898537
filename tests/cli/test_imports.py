"""While large packages are imported, no garbage is looked for."""

import gc
from collections.abc import Iterator

import pytest

from cli.imports import importing


@pytest.fixture(params=[True, False], ids=["enabled", "disabled"])
def enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether garbage was looked for before."""
    if not request.param:
        gc.disable()
    yield request.param
    gc.enable()


def test_garbage_is_looked_for_again_afterwards_if_it_was_before(enabled: bool) -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[index] for index in range(1000)]
    assert gc.isenabled() == enabled
    assert gc.get_freeze_count() >= before + len(made)
    with pytest.raises(ImportError), importing():
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled() == enabled
