"""The console's static files: read once, each with its tag and compressed once."""

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

_FOLDER = Path(__file__).parent / "static"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent.

    Attributes:
        tag: of these bytes, without quotes.
    """

    media_type: str
    tag: str
    content: bytes
    gzipped: bytes


@cache
def static_files() -> Mapping[str, StaticFile]:
    """Every file by its path in the folder: `app.js`, `pages/try.js`."""
    return MappingProxyType(
        {
            path.relative_to(_FOLDER).as_posix(): _read(path)
            for path in sorted(_FOLDER.rglob("*"))
            if path.suffix in _MEDIA_TYPES
        }
    )


def _read(path: Path) -> StaticFile:
    content = path.read_bytes()
    return StaticFile(
        _MEDIA_TYPES[path.suffix],
        sha256(content).hexdigest()[:32],
        content,
        # Without a time, so that all processes send the same bytes.
        gzip.compress(content, mtime=0),
    )
