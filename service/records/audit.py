"""The audit log: who changed which adapter or key, who read kept texts, and whose request was
refused.

A change has two lines with the same `change`: `begun`, which is on the disk before anything is
changed, and `ended` with its outcome. One without the other was interrupted. A change that cannot
be recorded is refused, but for deletions where the disk is full, which is what makes room. Texts
are not given to anybody either before that is recorded, in one line.

Refused requests have a file of their own, because anybody can make them: however many there are,
they rotate none of the changes away.
"""

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

from adapters.errors import StoreFailed
from adapters.format.failures import is_full, store_failed
from service.access.events import AccessEvent, AccessRefused, KeysChanged
from service.errors import AuditFailed
from service.records.background import BackgroundLines
from service.records.line_file import LineFile, json_line, now
from service.settings import Settings

logger = logging.getLogger(__name__)

# Done; nothing was to be done; the caller's fault; the service's, or unknown.
Outcome: TypeAlias = Literal["done", "unchanged", "refused", "failed"]

# Of each kind, that wait to be written. Beyond them they are counted, not kept: whoever sends
# wrong keys without end must not fill memory.
_MAX_WAITING = 1000


class AuditLog:
    """Appends records of changes, synced; with `file` None it records nothing.

    Every method blocks on the disk.

    Args:
        store: the folder of the adapter store, if the log is on its disk.
        failed: called when a record is lost.
    """

    def __init__(
        self,
        file: LineFile | None,
        *,
        store: Path | None = None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._file = file
        self._store = store
        self._failed = failed

    def begun(self, event: str, facts: Mapping[str, Any], *, makes_room: bool = False) -> str:
        """Record a change before it is made; returns what its `ended` line is told by.

        Args:
            makes_room: the change goes on unrecorded if the disk is full.

        Raises:
            AuditFailed: it could not be recorded, so it must not be made.
            StoreFailed: the same, where the disk is the store's.
        """
        change = secrets.token_hex(8)
        try:
            self._append(event, {"change": change, "stage": "begun", **facts})
        except OSError as error:
            if not (makes_room and is_full(error)):
                raise self._refusal(error, "the change") from None
            self._failed()
            logger.error("the audit log misses that a change began: %s", error.strerror or error)
        return change

    def disclosed(self, event: str, facts: Mapping[str, Any]) -> None:
        """Record that somebody is about to get what others have sent.

        Raises:
            AuditFailed, StoreFailed: it could not be recorded, so it must not be sent.
        """
        try:
            self._append(event, facts)
        except OSError as error:
            raise self._refusal(error, "the reading") from None

    def ended(
        self,
        event: str,
        change: str,
        facts: Mapping[str, Any],
        outcome: Outcome,
        reason: str | None = None,
    ) -> None:
        """Record how a change ended. If that fails, it is logged: what is done is done.

        Args:
            change: what `begun` returned; empty if it was refused before that.
        """
        record = {
            "change": change or secrets.token_hex(8),
            "stage": "ended",
            **facts,
            "outcome": outcome,
            "reason": reason,
        }
        try:
            self._append(event, record)
        except OSError as error:
            self._failed()
            logger.error("the audit log misses a change event=%s %s", event, error)

    def _refusal(self, error: OSError, what: str) -> AuditFailed | StoreFailed:
        self._failed()
        if self._store is not None:
            return store_failed(self._store, f"record {what}", error)
        return AuditFailed(f"{what} cannot be recorded: {error.strerror or error}")

    def _append(self, event: str, facts: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.append(_line(event, facts), sync=True)


class AccessRecords:
    """Changed keys and refused requests, each recorded by a thread of their own: `Guard.listen`
    takes `listen`.

    Args:
        file: of the audit log, where changed keys go; None: nothing is recorded.
    """

    def __init__(self, file: LineFile | None, dropped: Callable[[int], None]) -> None:
        self._lines: dict[type[AccessEvent], BackgroundLines[AccessEvent]] = {}
        if file is not None:
            for kind, its_file in (KeysChanged, file), (AccessRefused, refusals_file(file)):
                self._lines[kind] = BackgroundLines(
                    its_file, _access_line, limit=_MAX_WAITING, dropped=dropped, sync=True
                )

    def listen(self, event: AccessEvent) -> None:
        if (lines := self._lines.get(type(event))) is not None:
            lines.offer(event, 1)

    def close(self) -> None:
        for lines in self._lines.values():
            lines.close()


def audit_log(settings: Settings, failed: Callable[[], None] = lambda: None) -> AuditLog:
    """The audit log that the settings describe; without a file if they want none."""
    file = audit_file(settings)
    inside = file is not None and file.path.is_relative_to(settings.adapter_dir)
    return AuditLog(file, store=settings.adapter_dir if inside else None, failed=failed)


def audit_file(settings: Settings) -> LineFile | None:
    """The file of the audit log, if the settings want one."""
    if settings.audit_log is None:
        return None
    path = settings.audit_log
    if path == Path():
        path = settings.adapter_dir / ".audit" / "audit.jsonl"
    return LineFile(path, max_bytes=settings.record_bytes, kept=settings.record_files)


def refusals_file(changes: LineFile) -> LineFile:
    """Where refused requests go, beside the file of the changes."""
    path = changes.path
    return changes.at(path.with_name(f"{path.stem}-refused{path.suffix}"))


def check_audit_log(settings: Settings) -> None:
    """
    Raises:
        OSError: the audit log cannot be written.
    """
    if (file := audit_file(settings)) is not None:
        for each in (file, refusals_file(file)):
            each.append(b"", sync=False)


def _access_line(event: AccessEvent) -> bytes:
    facts = asdict(event)
    facts.pop("at")
    name = "request.refused" if isinstance(event, AccessRefused) else "keys.changed"
    return _line(name, facts)


def _line(event: str, facts: Mapping[str, Any]) -> bytes:
    return json_line({"time": now(), "event": event, **facts, "process": os.getpid()})
