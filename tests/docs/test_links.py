"""Links between the pages, as a code host shows them: files exist, and so do their anchors."""

import re
from pathlib import Path
from posixpath import normpath

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("README.md", "SECURITY.md", "CHANGELOG.md", "adapters/zoo/README.md")
PAGES = [*(ROOT / name for name in OUTSIDE), *sorted((ROOT / "docs").rglob("*.md"))]


def text_of(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^(```|~~~).*?^\1[^\n]*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """As code hosts make them: lower case, no punctuation, a dash for each space."""
    anchors: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text_of(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = anchors.get(anchor, 0)
        anchors[anchor] = count + 1
        if count:
            anchors[f"{anchor}-{count}"] = 1
    return anchors.keys() | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text_of(page)))


def links_of(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]+`", "", text_of(page))
    found = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text)
    return [*found, *re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = ROOT / normpath((page.parent / file).relative_to(ROOT)) if file else page
        if not target.is_file() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


def test_the_checker_sees_links_and_anchors() -> None:
    links = [link for page in PAGES for link in links_of(page)]
    assert len(links) > 150
    assert sum("#" in link for link in links) > 15
    assert "figures-of-a-gpu" in anchors_of(ROOT / "docs" / "benchmarks.md")
