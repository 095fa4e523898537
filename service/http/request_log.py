"""A line for every request, at `info`: what was asked, by whom, and how it ended.

A service answers thousands of requests a second, so the lines are limited. In each second, the
first `LINES_PER_SECOND` requests that succeed have a line, and fewer of those that fail: a client
without a key cannot fill the disk. One line at the end of the second counts the others. Probes,
metrics and pages that need no key have their lines at `debug`.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

from starlette.types import Scope

from service.access.scopes import Match
from service.observability.logs import REQUEST

logger = logging.getLogger("service.requests")

LINES_PER_SECOND, FAILED_LINES_PER_SECOND = 50, 10
# Adapters that a line names, and characters of a path.
_NAMES, _PATH = 5, 200


def note_texts(scope: Scope, names: Sequence[str]) -> None:
    """Remember how many texts a request has, and their adapters; a job calls this for each portion.

    Args:
        names: each text's adapter.
    """
    scope["idspam.texts"] = scope.get("idspam.texts", 0) + len(names)
    known: dict[str, None] = scope.setdefault("idspam.adapters", {})
    for name in dict.fromkeys(names):
        if len(known) > _NAMES:
            return
        known[name] = None


class RequestLog:
    """Of one process; called on its event loop."""

    def __init__(self) -> None:
        self._lines: Counter[bool] = Counter()
        self._left_out: Counter[bool] = Counter()
        self._ends: asyncio.TimerHandle | None = None

    def done(
        self,
        scope: Scope,
        asked: Match | None,
        *,
        method: str,
        route: str,
        status: int,
        outcome: str,
        seconds: float,
    ) -> None:
        """Log a request that has ended. asked: the route that its path names."""
        failed = status == 0 or status >= 400
        level = logging.DEBUG if _is_quiet(asked, failed=failed) else logging.INFO
        if not logger.isEnabledFor(level) or not self._has_room(failed):
            return
        names = [*scope.get("idspam.adapters", ())]
        more = ["..."] if len(names) > _NAMES else []
        logger.log(
            level,
            REQUEST,
            method,
            scope["path"][:_PATH],
            route,
            status,
            outcome,
            scope.get("idspam.error"),
            seconds * 1000,
            scope.get("idspam.texts"),
            ",".join(names[:_NAMES] + more) or None,
            scope.get("idspam.client") or None,
            (scope.get("client") or ("",))[0] or None,
        )

    def _has_room(self, failed: bool) -> bool:
        if self._ends is None:
            self._ends = asyncio.get_running_loop().call_later(1.0, self._second_over)
        if self._lines[failed] < (FAILED_LINES_PER_SECOND if failed else LINES_PER_SECOND):
            self._lines[failed] += 1
            return True
        self._left_out[failed] += 1
        return False

    def _second_over(self) -> None:
        self._ends = None
        left_out = self._left_out.copy()
        self._lines.clear()
        self._left_out.clear()
        if left_out:
            logger.info(
                "further requests were not logged succeeded=%d failed=%d",
                left_out[False],
                left_out[True],
            )


def _is_quiet(asked: Match | None, *, failed: bool) -> bool:
    if asked is None:
        return False
    # A probe that fails, as while the service loads, says so until it does not.
    is_page = asked.need.is_open or asked.need.scopes == {"metrics"}
    return asked.need.is_probe or (is_page and not failed)
