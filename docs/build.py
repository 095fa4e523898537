"""Builds the documentation as a site: `make docs` writes runs/site, `make docs-serve` shows it.

The pages are docs/*.md, the README as the home page, and a few files that people and tools look for
elsewhere in the tree. They are copied to runs/docs with their links changed, because Zensical takes
pages from one folder and keeps its cache beside its configuration.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from posixpath import normpath, relpath

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "runs" / "docs"
SITE = ROOT / "runs" / "site"
ADDRESS = "127.0.0.1:8001"

# Where a file outside docs/ is on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "adapters/zoo/README.md": "zoo.md",
    "adapters/zoo/banking77.md": "card-banking77.md",
    "adapters/zoo/clinc150.md": "card-clinc150.md",
}
# Browsers start no worker from a file, so the search needs this there; Zensical has it from a CDN.
_WORKER = ("https://unpkg.com/iframe-worker/shim", "vendor/iframe-worker-1.0.4/index.js")
# What a page says of an example that no test runs: tests/support/page_examples.py.
_MARK = re.compile(r"^<!-- (not run on this page|not run): (.+?) -->\n", re.MULTILINE)
_SHOWN_MARKS = {
    "not run on this page": "Examples on this page are not run by the tests",
    "not run": "Not run by the tests",
}
_FENCED = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(
    r"(?<=\]\()(?![a-z]+:|#)([^)\s]+)(?=[)\s])|(?<=(?:src|ref|set)=\")(?![a-z]+:|#)([^\"]+)"
)


_NAMED = re.compile(r"\[(?:[\w-]+/)?([\w-]+\.md)\]\(\1(#[^)]*)?\)")


class BrokenLink(Exception):
    """A page links to a file that the site does not have."""


def main(arguments: list[str]) -> int:
    """Build the site, or show it and build it again when a page changes; the exit code."""
    if shutil.which("zensical", path=Path(sys.executable).parent) is None:
        sys.exit("docs: Zensical is not installed: make setup, or pip install zensical")
    try:
        stage(PLACE)
    except BrokenLink as error:
        sys.exit(f"docs: {error}")
    if "--serve" in arguments:
        return _serve(arguments[arguments.index("--serve") + 1 :])
    code = build(PLACE)
    if code == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        (PLACE / "site").rename(SITE)
        sys.stdout.write(f"docs: open {SITE.relative_to(ROOT)}/index.html\n")
    return code


def build(place: Path) -> int:
    """Build what was staged there, into its folder `site`; a warning is an error."""
    shutil.rmtree(place / ".cache", ignore_errors=True)  # pages from the cache give no warnings
    code = subprocess.run([*_zensical("build", place), "--strict"], check=False).returncode
    for page in (place / "site").rglob("*.html"):
        depth = len(page.relative_to(place / "site").parts) - 1
        page.write_text(_mended(page.read_text("utf-8"), "../" * depth), "utf-8")
    return code


def _mended(html: str, top: str) -> str:
    html = html.replace(_WORKER[0], top + _WORKER[1])
    # A screen reader would announce headers that say nothing.
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)


def stage(place: Path) -> None:
    """Copy the pages to `place`, and remove those that are no more.

    Raises:
        BrokenLink: a link leads to a file that is not on the site.
    """
    pages = place / "pages"
    wanted = {"zensical.toml": (ROOT / "docs" / "zensical.toml").read_bytes()}
    for source in sorted((ROOT / "docs").rglob("*")):
        name = source.relative_to(ROOT / "docs").as_posix()
        if source.is_dir() or source.suffix in (".py", ".pyc", ".toml"):
            continue
        content = source.read_bytes()
        if source.suffix == ".md":
            content = with_links_of_site(content.decode(), f"docs/{name}").encode()
        wanted[f"pages/{name}"] = content
    for path, name in ELSEWHERE.items():
        text = (ROOT / path).read_text("utf-8")
        wanted[f"pages/{name}"] = with_links_of_site(text, path).encode()
    for old in [path for path in pages.rglob("*") if path.is_file()]:
        if old.relative_to(place).as_posix() not in wanted:
            old.unlink()
    for name, content in wanted.items():
        target = place / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def with_links_of_site(text: str, path: str) -> str:
    """A page of the tree with its links as the site needs them; `path` is where the page is.

    Raises:
        BrokenLink: a link leads to a file that is not on the site.
    """
    here = os.path.dirname(_on_site(path))
    result, end = [], 0
    for fenced in _FENCED.finditer(text):
        result += [_rewritten(text[end : fenced.start()], path, here), fenced[0]]
        end = fenced.end()
    return "".join([*result, _rewritten(text[end:], path, here)])


def _rewritten(text: str, path: str, here: str) -> str:
    def target_of(link: re.Match[str]) -> str:
        file, hash_, anchor = link[0].partition("#")
        found = normpath(os.path.join(os.path.dirname(path), file))
        if not (found.startswith("docs/") or found in ELSEWHERE) or not (ROOT / found).is_file():
            raise BrokenLink(f"{path}: {link[0]} is not on the site")
        return relpath(_on_site(found), here or ".") + hash_ + anchor

    return _MARK.sub(_shown_mark, _NAMED.sub(_with_title, _LINK.sub(target_of, text)))


def _with_title(link: re.Match[str]) -> str:
    """In the tree a link shows the name of its file, on the site the title of its page."""
    return f"[{_titles().get(link[1], link[1])}]({link[1]}{link[2] or ''})"


@cache
def _titles() -> dict[str, str]:
    navigation = (ROOT / "docs" / "zensical.toml").read_text("utf-8")
    return {page: title for title, page in re.findall(r'"([^"]+)" = "([^"]+\.md)"', navigation)}


def _shown_mark(mark: re.Match[str]) -> str:
    """A line that readers of the site see."""
    return f"*{_SHOWN_MARKS[mark[1]]}: {mark[2]}.*{{ .example-mark }}\n\n"


def _on_site(path: str) -> str:
    return ELSEWHERE.get(path) or path.removeprefix("docs/")


def _zensical(command: str, place: Path) -> list[str]:
    return [sys.executable, "-m", "zensical", command, "-f", str(place / "zensical.toml")]


def _serve(arguments: list[str]) -> int:
    address = arguments[0] if arguments else ADDRESS
    server = subprocess.Popen([*_zensical("serve", PLACE), "--dev-addr", address])
    ended = threading.Event()
    watcher = threading.Thread(target=_stage_again, args=(ended,), daemon=True)
    watcher.start()
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        ended.set()
        server.terminate()


def _stage_again(ended: threading.Event) -> None:
    while not ended.wait(1):
        try:
            stage(PLACE)
        except BrokenLink as error:
            sys.stderr.write(f"docs: {error}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
