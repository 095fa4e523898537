"""The decision log: what was answered, by which adapter; the texts only as hashes.

The hash of an input is keyed, so that texts cannot be guessed from it without the key, which is in
a file beside the log. The same text has the same hash as long as that file stays.
"""

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from service.engine.interface import AdapterKey
from service.records.background import BackgroundLines
from service.records.line_file import LineFile, json_line, now
from service.settings import Settings

logger = logging.getLogger(__name__)

# Characters of texts that wait to be written, of which each holds one to four bytes of memory.
MAX_CHARACTERS = 16 * 2**20
# A decision counts as at least this many, for what it holds beside its text.
_LEAST_CHARACTERS = 512
_HASH_BYTES = 16


class Input(Protocol):
    """One text as it was asked about."""

    @property
    def text(self) -> str: ...
    @property
    def text_pair(self) -> str | None: ...
    @property
    def key(self) -> AdapterKey: ...


@dataclass(slots=True, eq=False)
class Decision:
    """The answers to one request. labels: each text's label, or its set of labels. seconds: from
    the texts to the scores. abstained: by the text's index, whether its label is no answer, where a
    threshold says when."""

    time: str
    request_id: str
    client: str
    backbone: str
    inputs: Sequence[Input]
    labels: Sequence[str | Sequence[str]]
    scores: Sequence[float]
    seconds: float
    abstained: Mapping[int, bool]


class DecisionLog:
    """Writes decisions in a thread; see `BackgroundLines` for what is dropped.

    Args:
        key: returns the key of the hashes, or raises an OSError; called until it has been had once.
        texts: whether the texts themselves are written, too.
    """

    def __init__(
        self,
        file: LineFile,
        key: Callable[[], bytes],
        *,
        texts: bool,
        dropped: Callable[[int], None],
    ) -> None:
        self._read_key = key
        self._key = b""
        self._texts = texts
        self._lines: BackgroundLines[Decision] = BackgroundLines(
            file, self._encoded, limit=MAX_CHARACTERS, dropped=dropped, sync=False
        )
        # Old decisions go also while nothing is asked.
        self._lines.start()

    def offer(self, decision: Decision) -> None:
        """Takes microseconds, and never raises or waits."""
        size = sum(len(item.text) + len(item.text_pair or "") for item in decision.inputs)
        self._lines.offer(decision, size + _LEAST_CHARACTERS * len(decision.inputs))

    def close(self) -> None:
        """Write what waits, for two seconds at most."""
        self._lines.close()

    def _encoded(self, decision: Decision) -> bytes:
        self._key = self._key or self._read_key()
        lines = []
        for index, item in enumerate(decision.inputs):
            record: dict[str, Any] = {
                "time": decision.time,
                "request_id": decision.request_id,
                "client": decision.client,
                "index": index,
                "adapter": item.key.name,
                "revision": item.key.revision,
                "backbone": decision.backbone,
                "input": input_hash(self._key, item.text, item.text_pair),
                "label": decision.labels[index],
                "score": round(decision.scores[index], 6),
                "ms": round(decision.seconds * 1000, 3),
            }
            if (abstained := decision.abstained.get(index)) is not None:
                record["abstained"] = abstained
            if self._texts:
                record["text"], record["text_pair"] = item.text, item.text_pair
            lines.append(json_line(record))
        return b"".join(lines)


def input_hash(key: bytes, text: str, text_pair: str | None) -> str:
    """The keyed BLAKE2b hash of an input, 32 hexadecimal digits."""
    digest = hashlib.blake2b(key=key, digest_size=_HASH_BYTES)
    for part in (text, text_pair):
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        # Its length in front: no two inputs run together, nor is an empty pair like none.
        digest.update(f"{-1 if part is None else len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def decision_log(settings: Settings, dropped: Callable[[int], None]) -> DecisionLog | None:
    """The log that the settings want, if any.

    One that cannot be opened now is only logged: a process that replaces another must start all the
    same, and drops what cannot be written.
    """
    if settings.decision_log is None:
        return None
    try:
        check_decision_log(settings)
    except OSError as error:
        logger.error("%s cannot be written: %s", settings.decision_log, error.strerror or error)
    file, key = _files_of(settings, settings.decision_log)
    return DecisionLog(file, key, texts=settings.decision_log_texts, dropped=dropped)


def check_decision_log(settings: Settings) -> None:
    """
    Raises:
        OSError: the decision log or its key cannot be written.
    """
    if settings.decision_log is not None:
        file, key = _files_of(settings, settings.decision_log)
        file.append(b"", sync=False)
        key()


def _files_of(settings: Settings, path: Path) -> tuple[LineFile, Callable[[], bytes]]:
    """The log's file, and what reads or makes its key."""
    file = LineFile(
        path,
        max_bytes=settings.record_bytes,
        kept=settings.record_files,
        days=settings.decision_log_days,
    )
    return file, partial(_key_of, path.with_name(f"{path.name}.key"))


def decided(
    request_id: str,
    client: str,
    backbone: str,
    inputs: Sequence[Input],
    labels: Sequence[str | Sequence[str]],
    scores: Sequence[float],
    seconds: float,
    *,
    abstained: Mapping[int, bool],
) -> Decision:
    """A decision of this moment."""
    return Decision(now(), request_id, client, backbone, inputs, labels, scores, seconds, abstained)


def _key_of(path: Path) -> bytes:
    """The key in this file, which is made if it is missing; whoever makes it first wins.

    Raises:
        OSError: it cannot be read or made, or is empty.
    """
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, secrets.token_hex(32).encode())
            os.fsync(descriptor)
            with suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            os.close(descriptor)
            temporary.unlink()
    key = path.read_bytes().strip()
    if not 16 <= len(key) <= 64:
        raise OSError(0, f"the key in {path} has {len(key)} bytes, expected 16 to 64")
    return key
