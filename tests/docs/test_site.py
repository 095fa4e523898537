"""The documentation as a site: it builds strictly, finds every page, and needs no network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from posixpath import normpath
from urllib.parse import unquote, urlsplit

import pytest

from docs import build

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("zensical", reason="the documentation's site cannot be built without Zensical")

# The site is built for them.
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page links to and loads, and which anchors it has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        elif tag in ("script", "img", "iframe", "source", "embed") and given.get("src"):
            self.loaded.append(given["src"] or "")
        elif tag == "link" and given.get("rel") not in ("canonical", "alternate", "prev", "next"):
            self.loaded.append(given["href"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    build.stage(place)
    assert build.build(place) == 0, "make docs"
    return place / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {
        path.relative_to(site).as_posix(): Page(path.read_text()) for path in site.rglob("*.html")
    }


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r'= "([^"]+\.md)"', (ROOT / "docs" / "zensical.toml").read_text())
    written = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert sorted(listed) == sorted(written | set(build.ELSEWHERE.values()))


@pytest.mark.slow
def test_every_link_and_anchor_of_the_site_exists(site: Path, pages: dict[str, Page]) -> None:
    broken = []
    for name, page in pages.items():
        if name == "404.html":
            continue
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            folder = "" if "/" not in name else name.rpartition("/")[0] + "/"
            target = normpath(folder + unquote(parts.path)) if parts.path else name
            anchor = unquote(parts.fragment)
            missing = target in pages and anchor and anchor not in pages[target].anchors
            if missing or not (site / target).is_file():
                broken.append(f"{name}: {link}")
    assert broken == []


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    assert len(pages) > 30
    for name, page in pages.items():
        assert [link for link in page.loaded if urlsplit(link).netloc] == [], name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", sheet.read_text()), sheet.name


def test_the_search_finds_every_page_without_a_server(site: Path, pages: dict[str, Page]) -> None:
    """Scripts may read no file from file://, so the index is a script as well."""
    index = (site / "search.js").read_text()
    found = json.loads(index.partition("=")[2].rstrip("; \n"))
    locations = {item["location"].partition("#")[0] for item in found["items"]}
    assert pages.keys() - {"404.html"} <= locations


def test_lists_tables_and_code_are_the_same_on_the_site_and_on_a_code_host(
    site: Path,
) -> None:
    """Two kinds of Markdown: what only one of them takes for a list would be a paragraph there."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tags = ("<li", "<table", "<pre", "<h2", "<h3", "<blockquote", "<tr")
    staged = site.parent / "pages"
    different = []
    for source in sorted(staged.rglob("*.md")):
        name = source.relative_to(staged).with_suffix(".html").as_posix()
        article = re.search(r"<article.*?</article>", (site / name).read_text(), re.DOTALL)
        assert article, name
        host = markdown.render(
            re.sub(r"\A---\n.*?\n---\n", "", source.read_text(), flags=re.DOTALL)
        )
        for tag in tags:
            ours, theirs = (len(re.findall(rf"{tag}\b", html)) for html in (article[0], host))
            if ours != theirs:
                different.append(f"{name}: {ours} {tag}> on the site, {theirs} on a code host")
    assert different == []


def test_a_link_out_of_the_site_is_refused() -> None:
    with pytest.raises(build.BrokenLink, match=r"docs/x\.md: \.\./Makefile is not on the site"):
        build.with_links_of_site("[targets](../Makefile)", "docs/x.md")


def test_links_are_changed_for_the_site_but_not_in_code() -> None:
    text = (
        "[a](docs/api.md#predict)\n```sh\n[b](docs/api.md)\n```\n[c](https://example.org) [d](#e)"
    )
    changed = "[a](api.md#predict)\n```sh\n[b](docs/api.md)\n```\n[c](https://example.org) [d](#e)"
    assert build.with_links_of_site(text, "README.md") == changed
    assert build.with_links_of_site("[s](../SECURITY.md)", "docs/api.md") == "[s](security.md)"


def test_a_link_that_shows_a_file_shows_the_title_of_its_page() -> None:
    changed = build.with_links_of_site("[bulk.md](bulk.md#the-stream)", "docs/api.md")
    assert changed == "[Many texts](bulk.md#the-stream)"
