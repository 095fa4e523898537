"""The console's static files: read once, each with its tag and compressed once.

Two of them are put together here, so that a first load takes few round trips: `all.js` is all
modules in one, and the page has its style and its early script in it. The policy names both by
their hashes.
"""

import gzip
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from service.http.console.joined import joined

PAGE = "index.html"
# All modules, beginning with the shell, but not what is vendored: it is loaded when it is needed.
JOINED = "all.js"
_SHELL = "app.js"
_STYLE = "ui.css"
# No module: it runs before the first paint.
_EARLY = "early.js"
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
    contents = {
        path.relative_to(_FOLDER).as_posix(): path.read_bytes()
        for path in sorted(_FOLDER.rglob("*"))
        if path.suffix in _MEDIA_TYPES
    }
    modules = {
        path: content.decode()
        for path, content in contents.items()
        if path.endswith(".js") and path != _EARLY and not path.startswith("vendor/")
    }
    contents[JOINED] = joined(modules, _SHELL).encode()
    contents[PAGE] = _with_inlined(contents)
    return MappingProxyType({path: _file(path, content) for path, content in contents.items()})


@cache
def content_policy() -> str:
    """Scripts and styles come from this service alone, and no script can write markup.

    With trusted types and no policy of them, a label can never become HTML. The scripts set styles
    property by property.
    """
    files = static_files()
    style, script = (_hash(files[path].content) for path in (_STYLE, _EARLY))
    return (
        f"default-src 'none'; script-src 'self' {script}; style-src 'self' {style}; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _with_inlined(contents: Mapping[str, bytes]) -> bytes:
    """The page with what it needs before its first paint: its style, and the early script."""
    page = contents[PAGE].decode()
    for tag, element, path in (
        ('<link rel="stylesheet" href="console/ui.css">', "style", _STYLE),
        ('<script src="console/early.js"></script>', "script", _EARLY),
    ):
        if page.count(tag) != 1:
            raise ValueError(f"{PAGE} has not one {tag}")
        page = page.replace(tag, f"<{element}>{contents[path].decode()}</{element}>")
    return page.encode()


def _hash(content: bytes) -> str:
    """As a policy names a style or script that is written in the page."""
    return f"'sha256-{b64encode(sha256(content).digest()).decode()}'"


def _file(path: str, content: bytes) -> StaticFile:
    return StaticFile(
        _MEDIA_TYPES[PurePosixPath(path).suffix],
        sha256(content).hexdigest()[:32],
        content,
        # Without a time, so that all processes send the same bytes.
        gzip.compress(content, mtime=0),
    )
