"""A body of any length as lines of bounded length, however it is cut into chunks."""

import re
from dataclasses import dataclass

# What `bytes.isspace` calls space; none of it is above the blank.
_BLANK = re.compile(rb"[ \t\n\r\x0b\f]+")
_SPACE = ord(" ")


# Not frozen: there is one for every text.
@dataclass(slots=True, eq=False)
class Line:
    """One line without its end. number: counted from 1, blank lines included. size: in bytes.

    content: None if the line is longer than allowed.
    """

    number: int
    content: bytes | None
    size: int


class LineSplitter:
    """Takes chunks and gives lines, one at a time, so that a large chunk does not become many
    objects at once.

    Args:
        max_bytes: of a line. What is longer is counted and not kept.

    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._number = 0
        # What has come of the line whose end has not come, and how long it is in all.
        self._begun = bytearray()
        self._length = 0
        # The last chunk, and how far it was read.
        self._chunk = b""
        self._position = 0
        self._ended = False

    @property
    def held(self) -> int:
        """Bytes that are kept and not part of a line that was given."""
        return len(self._begun) + len(self._chunk) - self._position

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk. All lines of the one before must have been given."""
        assert self._position == len(self._chunk), "lines of the last chunk are left"
        self._chunk, self._position = chunk, 0

    def end(self) -> None:
        """The body has ended; its last line may lack its end."""
        self._ended = True

    def next(self) -> Line | None:
        """The next line that is not blank; None if more must come first."""
        while True:
            self._skip_blank()
            chunk, start = self._chunk, self._position
            end = chunk.find(b"\n", start)
            if end < 0:
                self._keep(chunk[start:])
                self._chunk, self._position = b"", 0
                if not self._ended or not self._length:
                    return None
                line = self._line(b"")
            else:
                self._position = end + 1
                line = self._line(chunk[start:end])
            if line.content is None or (line.content and not line.content.isspace()):
                return line

    def _skip_blank(self) -> None:
        """Skip blank lines at once: a chunk may have a quarter of a million of them."""
        chunk, start = self._chunk, self._position
        if self._length or start == len(chunk) or chunk[start] > _SPACE:
            return
        run = _BLANK.match(chunk, start)
        end = 0 if run is None else chunk.rfind(b"\n", start, run.end()) + 1
        if start < end <= start + self._max_bytes:
            self._number += chunk.count(b"\n", start, end)
            self._position = end

    def _keep(self, piece: bytes) -> None:
        self._length += len(piece)
        if self._length > self._max_bytes:
            self._begun.clear()
        else:
            self._begun += piece

    def _line(self, rest: bytes) -> Line:
        self._number += 1
        size = self._length + len(rest)
        content = None if size > self._max_bytes else bytes(self._begun) + rest
        self._begun.clear()
        self._length = 0
        return Line(self._number, content, size)
