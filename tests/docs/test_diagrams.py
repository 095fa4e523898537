"""docs/diagrams: the files are what the script draws, for light and dark, and pages show them."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from docs.diagrams import draw

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "diagrams"
NAMES = list(draw.DIAGRAMS)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_what_the_script_draws(name: str) -> None:
    assert (FOLDER / f"{name}.svg").read_text() == draw.DIAGRAMS[name]().svg(), "make diagrams"


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_title_and_colours_for_light_and_dark(name: str) -> None:
    drawn = ElementTree.fromstring((FOLDER / f"{name}.svg").read_text())
    space = "{http://www.w3.org/2000/svg}"
    assert drawn.findtext(f"{space}title")
    style = drawn.findtext(f"{space}style") or ""
    light, _, dark = style.partition("@media (prefers-color-scheme:dark)")
    classes = {part for node in drawn.iter() for part in node.get("class", "").split()}
    for each in classes - {"panel", "head", "line"}:
        assert f".{each}{{" in light or f".{each}," in light, each
        assert f".{each}{{" in dark or f".{each}," in dark, each


def test_no_file_is_left_over_and_each_is_on_a_page() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.svg")) == sorted(NAMES)
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    assert [name for name in NAMES if f"diagrams/{name}.svg" not in pages] == []


def test_text_that_leaves_its_box_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs"):
        draw.Drawing(100, "too long").box(0, 0, 60, 30, "a line that is much too long")
