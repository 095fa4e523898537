"""A real browser on the console: Debian's chromium, driven by playwright, looked at by axe.

`open_console` gives a page that fails its test if a script of it raises or its policy is broken.
`look_at` takes the pictures of a page, wide and narrow, light and dark, and checks each of them.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from axe_playwright_python.base import AXE_FILE_PATH
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    expect,
    sync_playwright,
)

from tests.support.service_process import TREE
from tests.support.unavailable import unavailable

# What .ci/chromium unpacks where the system has none.
_FETCHED = TREE / ".cache" / "chromium"
# The pictures, as output of CI.
SCREENSHOTS = TREE / "runs" / "screenshots"
# Milliseconds. The machine may be busy.
PATIENCE = 15_000
WIDE, NARROW = (1280, 900), (320, 640)
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
# The browser's own lines about answers that the page has handled.
_EXPECTED = ("Failed to load resource",)


def chromium_program() -> str:
    """The browser's path; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None and (_FETCHED / "run").exists():
        program = str(_FETCHED / "run")
    if program is None:
        unavailable("chromium is missing: run .ci/chromium (Debian) or install chromium")
    return program


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; the test is skipped where there is none."""
    program = chromium_program()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            # The tests run as root in containers, on pages of their own.
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Console:
    """A page of the console in a browser of its own: no cookies, no storage, no cache from before.

    Attributes:
        problems: errors of scripts, broken policies and warnings that nothing has expected.
    """

    url: str
    page: Page
    context: BrowserContext
    problems: list[str] = field(default_factory=list)

    def go(self, route: str = "") -> None:
        """Open a route: `#/compare?a=x`."""
        self.page.goto(f"{self.url.rstrip('/')}/{route}")

    def run(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression or function in the page."""
        return self.page.evaluate(script, argument)

    def violations(self) -> list[str]:
        """What axe finds on the page as it is now: a line for each rule and element."""
        if not self.run("() => 'axe' in window"):
            self.page.evaluate(AXE_FILE_PATH.read_text())
        found = self.run(
            "rules => axe.run({runOnly: rules, resultTypes: ['violations']})", list(_RULES)
        )
        return [
            f"{rule['id']}: {rule['help']}: {' '.join(map(str, node['target']))}: "
            f"{node.get('failureSummary', '')}"
            for rule in found["violations"]
            for node in rule["nodes"]
        ]

    def look_at(self, name: str, *, themes: tuple[Literal["light", "dark"], ...] = THEMES) -> None:
        """Take pictures of the page, and check that axe finds nothing and nothing is cut off.

        Args:
            name: of the files in runs/screenshots.
        """
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for width, height in (WIDE, NARROW):
            self.page.set_viewport_size({"width": width, "height": height})
            for theme in themes:
                self.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
                # What sticks to the top of a window belongs there in the picture.
                self.run("() => scrollTo(0, 0)")
                shape = "wide" if width == WIDE[0] else "narrow"
                path = SCREENSHOTS / f"{name}-{shape}-{theme}.png"
                self.page.screenshot(path=path, full_page=True, animations="disabled")
                assert not (found := self.violations()), f"{path.name}:\n" + "\n".join(found)
            over = self.run("() => document.scrollingElement.scrollWidth - innerWidth")
            assert over <= 0, f"{name}: {over} pixels wider than a window of {width}"
        self.page.set_viewport_size({"width": WIDE[0], "height": WIDE[1]})
        self.page.emulate_media(color_scheme="light")


@contextmanager
def open_console(
    browser: Browser, url: str, *, route: str = "", **options: Any
) -> Iterator[Console]:
    """A page of a service's console.

    Args:
        route: opened at once.
        options: of playwright's `new_context`.
    """
    context = browser.new_context(
        viewport={"width": WIDE[0], "height": WIDE[1]}, accept_downloads=True, **options
    )
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    console = Console(url, page, context)
    page.on("pageerror", lambda error: console.problems.append(_said(error)))
    page.on("console", lambda message: _note(console, message))
    try:
        console.go(route)
        yield console
        assert not console.problems, "\n".join(console.problems)
    except Exception:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        test = os.environ.get("PYTEST_CURRENT_TEST", "test").split("::")[-1].split(" ")[0]
        with suppress(Error):
            page.screenshot(path=SCREENSHOTS / f"failed-{test[:80]}.png", full_page=True)
        raise
    finally:
        context.close()


def _said(error: Error) -> str:
    return f"{error.name}: {error.message}"


def _note(console: Console, message: ConsoleMessage) -> None:
    if message.type in ("error", "warning") and not message.text.startswith(_EXPECTED):
        console.problems.append(f"{message.type}: {message.text}")


def drop(console: Console, selector: str, name: str, content: bytes) -> None:
    """Drop a file on an element, as from the desktop."""
    data = console.page.evaluate_handle(
        """([name, bytes]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], name));
          return data;
        }""",
        [name, list(content)],
    )
    console.page.dispatch_event(selector, "drop", {"dataTransfer": data})


def downloaded(console: Console, button: str) -> tuple[str, bytes]:
    """Press a button by its name; the name and the bytes of the file that it gives."""
    with console.page.expect_download() as waiting:
        console.page.get_by_role("button", name=button).click()
    path = Path(waiting.value.path())
    return waiting.value.suggested_filename, path.read_bytes()
