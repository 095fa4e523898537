"""Named points in the code at which a test can make it fail. Inert in every service.

A point is a call with a constant name in front of a step that can fail for real, mostly a system
call:

    fault_point("pointer.rename")
    os.replace(temporary, path)

Nothing happens there unless the process was started with `ID_SPAM_TEST_FAULTS`, the path of a file.
While that file exists, it is read at every point; each line is `name action`, or `name action
count` for the point's count-th passing in this process and none other. Actions:

    kill      the process ends as by `kill -9`
    stop      the process stops as by SIGSTOP
    ENOSPC    an OSError with this (or any other) error number is raised
    sleep:N   the call takes N seconds longer
    yes       the call returns True, and the code around the point does what its comment says

A test in the same process can `install` a function of its own instead.
"""

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

VARIABLE = "ID_SPAM_TEST_FAULTS"

Handler: TypeAlias = Callable[[str], bool]


class _FromFile:
    """Does what the lines of a file say."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed: Counter[str] = Counter()

    def __call__(self, name: str) -> bool:
        self._passed[name] += 1
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        for line in lines:
            point, action, *count = line.split()
            if point == name and (not count or int(count[0]) == self._passed[name]):
                return act(action)
        return False


def act(action: str) -> bool:
    """Do what an action says; returns whether the code around the point is to act itself.

    Raises:
        OSError: the action is the name of an error number.
    """
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "yes":
            return True
        case _ if action.startswith("sleep:"):
            time.sleep(float(action.removeprefix("sleep:")))
        case _:
            number = getattr(errno, action)
            raise OSError(number, os.strerror(number))
    return False


_handler: Handler | None = _FromFile(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None


def fault_point(name: str) -> bool:
    """Fail here if a test asks for it. Costs 40 nanoseconds where none does."""
    return _handler is not None and _handler(name)


def install(handler: Handler | None) -> None:
    """Call this function at every point of this process, or nothing at all."""
    global _handler
    _handler = handler


def installed() -> bool:
    """Whether anything may happen at a point: a service says so at its start."""
    return _handler is not None
