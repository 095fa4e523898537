"""A plugin of pytest: most tests run side by side, one that measures time has the machine alone.

Processes of one run agree through two files that they lock. A test takes a share of the machine; a
test that is marked `alone` takes all of it, once the tests that run have ended.
"""

import fcntl
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

# Set by pytest-xdist in its workers. Without it one process runs all tests, one after another.
_RUN = "PYTEST_XDIST_TESTRUNUID"


# First of all hooks, so that a test's time limit does not run while it waits for the machine.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Give a test that is marked `alone` the machine for itself."""
    with machine_used(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def machine_used(*, alone: bool) -> Iterator[None]:
    """Wait for a share of the machine, or for all of it; give it back in the end."""
    if (run := os.environ.get(_RUN)) is None:
        yield
        return
    folder = Path(tempfile.gettempdir()) / f"idspam-tests-{run}"
    folder.mkdir(exist_ok=True)
    with ExitStack() as room:
        # Who wants all of the machine holds the door until the room is empty, so that those who
        # want a share do not keep it waiting for ever.
        with _locked(folder / "door", fcntl.LOCK_EX):
            room.enter_context(_locked(folder / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    # Closing it unlocks it.
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield
