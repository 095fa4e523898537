"""Draws the diagrams of the pages: `make diagrams` writes docs/diagrams/*.svg.

Each is one file for light and dark: its colours follow `prefers-color-scheme`, and so the page that
shows it. A line of text that would leave its box is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

WIDTH = 600
# Mean width of a character, in parts of the font's size; system fonts differ by a few per cent.
CHARACTER = 0.54

# Name: fill, line and text in light, then in dark.
COLOURS = {
    "plain": ("#ffffff", "#8793a5", "#1c2430", "#1d2530", "#76849a", "#e8ecf2"),
    "frozen": ("#e9edf2", "#8793a5", "#1c2430", "#313c4b", "#76849a", "#e8ecf2"),
    "blue": ("#dcebfd", "#2563b8", "#123a72", "#17365f", "#6ba6ee", "#d9e9fd"),
    "orange": ("#fdead7", "#b4570f", "#703407", "#56300f", "#eda05c", "#fde7d0"),
    "green": ("#ddf3e2", "#22803f", "#124d24", "#163f22", "#64c283", "#d8f5e0"),
    "violet": ("#eee5fb", "#7440b8", "#472275", "#3a2560", "#b391ea", "#ece1fc"),
    "red": ("#fde3e1", "#b3261e", "#7a1712", "#57201d", "#f08b83", "#fddedb"),
}
PANEL = ("#ffffff", "#12181f")
INK = ("#1c2430", "#e8ecf2")
FAINT = ("#566072", "#a3afc0")


class Drawing:
    """Shapes on a panel; coordinates in pixels from the upper left."""

    def __init__(self, height: int, title: str) -> None:
        self._height = height
        self._title = title
        self._parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *lines: str,
        kind: str = "plain",
        size: float = 14,
    ) -> None:
        """A rounded box with lines of text in its middle; the first is bold if there are several.

        Raises:
            ValueError: a line does not fit.
        """
        self._parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            ' rx="6"/>'
        )
        step = size * 1.3
        top = y + height / 2 - step * (len(lines) - 1) / 2 + size * 0.35
        for number, line in enumerate(lines):
            bold = number == 0 and len(lines) > 1
            smaller = size if bold or len(lines) == 1 else size - 1.5
            needed = len(line) * smaller * (CHARACTER + 0.03 * bold)
            if needed > width - 8:
                raise ValueError(f"{line!r} needs {needed:.0f} of {width:g} pixels")
            self.text(
                x + width / 2,
                top + step * number,
                line,
                kind=f"on-{kind}",
                size=smaller,
                anchor="middle",
                bold=bold,
            )

    def text(
        self,
        x: float,
        y: float,
        line: str,
        *,
        kind: str = "ink",
        size: float = 14,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """One line; y is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size:g}"'
            f' text-anchor="{anchor}"{weight}>{escape(line, quote=False)}</text>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False, both: bool = False) -> None:
        """A line through the points, with a head at its end, or at both ends."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        start = ' marker-start="url(#head)"' if both else ""
        self._parts.append(
            f'<path class="line" d="{path}"{dashes}{start} marker-end="url(#head)"/>'
        )

    def rule(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A thin dashed line without a head."""
        self._parts.append(
            f'<path class="line" stroke-dasharray="2 4" d="M{x1:g} {y1:g} L{x2:g} {y2:g}"/>'
        )

    def tokens(self, x: float, y: float, letters: str, kinds: dict[str, str]) -> float:
        """Small squares side by side, a letter each; a space is a gap. Returns where they end."""
        for letter in letters:
            if letter == " ":
                x += 8
                continue
            kind = kinds.get(letter.lower(), "plain")
            self._parts.append(
                f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="20" height="24" rx="3"/>'
            )
            self.text(
                x + 10, y + 16.5, letter, kind=f"on-{kind}", size=12, anchor="middle",
                bold=letter.isupper(),
            )  # fmt: skip
            x += 22
        return x

    def svg(self) -> str:
        """The file."""
        light, dark = [], []
        for name, (fill, line, ink, *others) in COLOURS.items():
            light.append(f".{name}{{fill:{fill};stroke:{line}}}.on-{name}{{fill:{ink}}}")
            fill, line, ink = others
            dark.append(f".{name}{{fill:{fill};stroke:{line}}}.on-{name}{{fill:{ink}}}")
        for rules, which in ((light, 0), (dark, 1)):
            rules.append(
                f".panel{{fill:{PANEL[which]}}}.ink{{fill:{INK[which]}}}"
                f".faint,.head{{fill:{FAINT[which]}}}.line{{fill:none;stroke:{FAINT[which]}}}"
            )
        style = "\n".join(
            (
                "svg{font-family:system-ui,'Segoe UI',Roboto,Helvetica,Arial,sans-serif}",
                "rect,.line{stroke-width:1.3}.panel{stroke:none}",
                *light,
                "@media (prefers-color-scheme:dark){",
                *dark,
                "}",
            )
        )
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height}"'
                f' width="{WIDTH}" height="{self._height}" role="img">',
                f"<title>{escape(self._title)}</title>",
                f"<style>{style}</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
                ' markerHeight="7" orient="auto-start-reverse">'
                '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
                f'<rect class="panel" width="{WIDTH}" height="{self._height}" rx="8"/>',
                *self._parts,
                "</svg>\n",
            )
        )


Diagram = Callable[[], Drawing]

TASKS = {"a": "blue", "b": "orange", "c": "green"}


def overview() -> Drawing:
    """One encoder, many adapters, one batch."""
    page = Drawing(250, "Texts of many tasks go through one frozen encoder in one batch")
    page.box(224, 34, 180, 198, kind="frozen")
    rows = (
        ("You won a free ticket", "sms-spam", "spam", "blue"),
        ("set an alarm for six", "clinc150", "alarm", "orange"),
        ("a warm, funny film", "sentiment", "positive", "green"),
    )
    for number, (text, adapter, label, kind) in enumerate(rows):
        y = 48 + number * 58
        page.box(16, y, 168, 40, text, size=13)
        page.arrow((184, y + 20), (222, y + 20))
        page.box(256, y, 116, 40, adapter, kind=kind, size=13)
        page.arrow((408, y + 20), (448, y + 20))
        page.box(450, y, 134, 40, label, kind=kind, size=13)
    page.text(100, 26, "one request", kind="faint", size=13, anchor="middle")
    page.text(314, 26, "one frozen encoder, one batch", kind="faint", size=13, anchor="middle")
    page.text(517, 26, "answers", kind="faint", size=13, anchor="middle")
    page.text(314, 224, "adapters of about 1 MB", kind="on-frozen", size=12, anchor="middle")
    return page


def adapter() -> Drawing:
    """The parts of an adapter, and where they act."""
    page = Drawing(420, "The three parts of an adapter and where each acts in the frozen backbone")
    page.box(230, 372, 220, 32, "the text as tokens", size=13)
    page.arrow((340, 372), (340, 346))
    page.box(
        200, 282, 280, 62, "layers 0 to m-1, frozen", "the same for every adapter", kind="frozen"
    )
    page.arrow((340, 282), (340, 256))
    page.box(230, 222, 220, 32, "P P P   t t t t t t", size=13)
    page.arrow((340, 222), (340, 196))
    page.box(
        200, 120, 280, 74, "layers m to L-1, frozen", "each text sees its own prompt", kind="frozen"
    )
    page.arrow((340, 120), (340, 96))
    page.box(230, 30, 220, 64, "class head", "label, scores, explanation", kind="violet")
    page.box(
        14,
        214,
        158,
        66,
        "prompt generator",
        "reads the text,",
        "writes t vectors",
        kind="blue",
        size=13,
    )
    page.arrow((200, 300), (93, 300), (93, 281))
    page.arrow((172, 238), (229, 238))
    page.box(
        14,
        124,
        158,
        66,
        "vectors or LoRA",
        "scale and shift what",
        "the layers compute",
        kind="orange",
        size=13,
    )
    page.arrow((172, 157), (199, 157))
    page.text(494, 318, "backbone:", kind="faint", size=12)
    page.text(494, 334, "shared, frozen", kind="faint", size=12)
    page.text(494, 62, "adapter:", kind="faint", size=12)
    page.text(494, 78, "all in colour", kind="faint", size=12)
    return page


def request() -> Drawing:
    """The way of a predict request."""
    page = Drawing(396, "The life of a predict request in eight steps")
    left = (
        ("1  gate", "key, quota, size, deadline", "plain"),
        ("2  adapters", "name to revision", "plain"),
        ("3  tokens", "each text, cut at what is read", "plain"),
        ("4  admission", "answered in time? room?", "plain"),
    )
    right = (
        ("8  answer", "label, scores, revision", "plain"),
        ("7  heads", "scores row by row", "violet"),
        ("6  one batch", "whatever waits, any tasks", "frozen"),
        ("5  residency", "adapters are on the device", "blue"),
    )
    for column, x in ((left, 22), (right, 340)):
        for number, (name, what, kind) in enumerate(column):
            page.box(x, 44 + number * 84, 238, 56, name, what, kind=kind)
    for number in range(3):
        page.arrow((141, 100 + number * 84), (141, 127 + number * 84))
        page.arrow((459, 127 + number * 84), (459, 100 + number * 84))
    page.arrow((260, 324), (339, 324))
    page.text(299, 316, "queue", kind="faint", size=12, anchor="middle")
    page.text(141, 30, "HTTP side", kind="faint", size=13, anchor="middle")
    page.text(459, 30, "engine, and back", kind="faint", size=13, anchor="middle")
    page.arrow((141, 352), (141, 374))
    page.text(152, 374, "no: 429 at once, with Retry-After", kind="faint", size=12)
    return page


def batch() -> Drawing:
    """A packed batch beside padded ones."""
    page = Drawing(
        330, "Three padded batches, one for each task, beside one packed batch of all three"
    )
    page.text(20, 30, "One padded batch for each task", size=14, bold=True)
    pads = {**TASKS, "-": "frozen"}
    for y, letters in (
        (44, "aaaaaaaaa"),
        (72, "aaa------"),
        (110, "bbbb"),
        (148, "ccccc"),
        (176, "cc---"),
    ):
        page.tokens(20, y, letters, pads)
    page.text(290, 60, "sms-spam: 9 wide, 6 places for nothing", kind="faint", size=12.5)
    page.text(290, 126, "clinc150: a batch of one", kind="faint", size=12.5)
    page.text(290, 164, "sentiment: 5 wide, 3 places for nothing", kind="faint", size=12.5)
    page.text(20, 238, "One packed batch of all tasks", size=14, bold=True)
    page.tokens(20, 250, "aaaaaaaaa aaa bbbb ccccc cc", TASKS)
    page.text(
        20,
        296,
        "Rows lie one after another, without padding. Attention sees only its own row, so",
        kind="faint",
        size=12.5,
    )
    page.text(
        20,
        314,
        "an answer does not depend on the other texts of the batch.",
        kind="faint",
        size=12.5,
    )
    return page


def prompts() -> Drawing:
    """How the batch grows at the insertion layer."""
    page = Drawing(250, "A packed batch below and above the layer where prompts are inserted")
    page.text(20, 32, "layers 0 to m-1: no prompt has been seen yet", size=13.5)
    page.tokens(20, 42, "aaaaaa bbb cccc", TASKS)
    page.text(
        20, 98, "layer m: each row's own generator reads its row and writes its prompt", size=13.5
    )
    page.tokens(20, 108, "PPPaaaaaa PPbbb PPPPcccc", TASKS | {"p": "violet"})
    page.text(20, 164, "heads: each row has its own labels", size=13.5)
    for x, label, kind in (
        (20, "spam 0.99", "blue"),
        (222, "alarm 0.99", "orange"),
        (354, "positive 0.98", "green"),
    ):
        page.box(x, 174, 124, 32, label, kind=kind, size=13)
    page.text(
        20,
        234,
        "P: a prompt vector. a, b, c: tokens of texts for three adapters.",
        kind="faint",
        size=12.5,
    )
    return page


def swap() -> Drawing:
    """A revision is replaced while requests run."""
    page = Drawing(
        290, "Replacing a revision: after the upload has returned only the new one answers"
    )
    page.text(20, 36, "upload", size=13)
    page.box(170, 18, 230, 30, "PUT: check, store, load, switch", kind="violet", size=13)
    page.rule(400, 14, 400, 262)
    page.text(406, 36, "PUT has returned", kind="faint", size=12)
    for number, (start, length, kind, label) in enumerate(
        (
            (60, 120, "blue", "old"),
            (130, 150, "blue", "old"),
            (240, 130, "blue", "old"),
            (330, 120, "green", "new"),
            (420, 140, "green", "new"),
        )
    ):
        y = 66 + number * 36
        page.text(20, y + 19, f"{number + 1}", kind="faint", size=12)
        page.box(start, y, length, 28, label, kind=kind, size=12.5)
    page.text(
        20,
        280,
        "Before: the old revision, or already the new one. After: only the new one. Nothing fails.",
        kind="faint",
        size=12.5,
    )
    return page


def tiers() -> Drawing:
    """Where adapters are."""
    page = Drawing(300, "Three tiers: stored, in host memory, on the device")
    rows = (
        ("on the device", "as many as fit: answer at once", "IDSPAM_MAX_ACTIVE_MIB", "green"),
        (
            "in host memory",
            "others that are used: one copy away",
            "IDSPAM_MAX_REGISTERED_MIB",
            "blue",
        ),
        ("stored", "all: a folder, or a bucket with replicas", "IDSPAM_ADAPTER_DIR", "frozen"),
    )
    for number, (name, what, setting, kind) in enumerate(rows):
        y = 24 + number * 88
        page.box(20, y, 300, 56, name, what, kind=kind)
        page.text(336, y + 33, setting, kind="faint", size=12)
    for y in (80, 168):
        page.arrow((110, y + 31), (110, y + 1))
        page.arrow((230, y + 1), (230, y + 31))
    page.text(118, 101, "copy", kind="faint", size=12)
    page.text(118, 189, "read, check", kind="faint", size=12)
    page.text(238, 101, "evict: least recently used, not in use", kind="faint", size=12)
    page.text(238, 189, "evict", kind="faint", size=12)
    page.text(
        20,
        284,
        "A request names any stored adapter; the service brings it up before the batch.",
        kind="faint",
        size=12.5,
    )
    return page


def processes() -> Drawing:
    """One engine and its workers."""
    page = Drawing(330, "A supervisor, HTTP workers, one engine process and its standby")
    page.box(200, 16, 250, 48, "supervisor", "starts, replaces, counts", kind="plain")
    page.box(16, 128, 92, 44, "clients", size=13)
    for number in range(3):
        x = 150 + number * 124
        page.box(x, 120, 106, 60, "worker", "HTTP, tokens", kind="blue", size=13)
        page.arrow((325, 64), (x + 53, 119), dashed=True)
        page.arrow(
            (x + 53, 180),
            (325 if number == 1 else x + 53 + (60 if number == 0 else -60), 231),
            both=True,
        )
    page.arrow((108, 150), (149, 150))
    page.box(190, 232, 270, 62, "engine", "queue, batches, device, adapters", kind="green")
    page.box(488, 232, 98, 62, "standby", "backbone", kind="frozen", size=13)
    page.arrow((488, 263), (461, 263))
    page.text(474, 312, "forks a new engine in 20 ms", kind="faint", size=12, anchor="middle")
    page.text(16, 318, "IDSPAM_WORKERS=3. With 0, all is one process.", kind="faint", size=12)
    return page


def rollout() -> Drawing:
    """A change with replicas."""
    page = Drawing(350, "A roll-out over replicas: prepare, ready, commit, switch")
    lanes = (
        ("replica 1", 90, "blue"),
        ("shared store", 300, "frozen"),
        ("replica 2", 510, "green"),
    )
    for name, x, kind in lanes:
        page.box(x - 74, 16, 148, 34, name, kind=kind)
        page.rule(x, 50, x, 312)
    steps = (
        (90, 300, 84, "PUT: upload, prepare"),
        (300, 510, 118, "reads the prepare"),
        (510, 300, 186, "ready"),
        (90, 300, 220, "commit"),
        (300, 510, 254, "reads the commit"),
        (510, 300, 288, "applied"),
    )
    for start, end, y, label in steps:
        page.arrow((start, y), (end, y))
        page.text((start + end) / 2, y - 6, label, kind="ink", size=12.5, anchor="middle")
    page.box(430, 128, 160, 44, "fetch, check hash,", "run a text, load", kind="plain", size=12)
    page.box(24, 274, 132, 34, "PUT returns", kind="violet", size=13)
    page.text(
        20,
        338,
        "One replica refuses: abort, 409, and the old revision goes on everywhere.",
        kind="faint",
        size=12.5,
    )
    return page


def choosing() -> Drawing:
    return _questions(
        "Which tool and which method: six questions from top to bottom",
        (
            ("The same labels in every request?", "no", ("an LLM",)),
            ("Some dozens of labelled rows a task?", "no", ("SetFit, an LLM,", "or --init-from")),
            (
                "One task, or a GPU for each task?",
                "yes",
                ("fine-tune a model,", "serve it with TEI"),
            ),
            ("Is every text in English?", "no", ("a multilingual", "--backbone")),
            ("Is a head as good, in the table of fit?", "yes", ("--method", "head-only")),
            ("Pairs, or a backbone of 12 layers?", "yes", ("compare it", "with lora")),
        ),
        ("the default:", "idspam+vectors"),
    )


def accuracy() -> Drawing:
    return _questions(
        "A bad accuracy: seven questions from top to bottom, and where each answer is",
        (
            ("No better than the majority class?", "yes", ("columns, language,", "more rows")),
            ("Far better on validation than on test?", "yes", ("X.repeats.csv,", "--drop-leaks")),
            ("Are texts cut, or full of [UNK]?", "yes", ("shorten them,", "another --backbone")),
            ("Are training rows labelled wrong?", "yes", ("X.suspects.csv",)),
            ("Is it one label that is bad?", "yes", ("more of its rows,", "or merge two labels")),
            ("Is the 95 % interval wide?", "yes", ("more test rows", "before you judge")),
            ("Was it good some weeks ago?", "yes", ("drift: label new", "rows, retrain")),
        ),
        ("--search 20,", "--method best"),
    )


def _questions(
    title: str, steps: Sequence[tuple[str, str, tuple[str, ...]]], end: tuple[str, ...]
) -> Drawing:
    """Questions from top to bottom. A step: the question, the answer that leaves, and to what."""
    page = Drawing(len(steps) * 74 + 84, title)
    for number, (question, leaving, outcome) in enumerate(steps):
        y = 16 + 74 * number
        other = "no" if leaving == "yes" else "yes"
        page.box(16, y, 330, 46, question, kind="plain")
        page.arrow((346, y + 23), (418, y + 23))
        page.text(380, y + 17, leaving, kind="faint", size=12.5, anchor="middle")
        _lines(page, 420, y, 164, 46, outcome, kind="orange")
        page.arrow((181, y + 46), (181, y + 72))
        page.text(190, y + 63, other, kind="faint", size=12.5)
    _lines(page, 76, 16 + 74 * len(steps), 210, 50, end, kind="green")
    return page


def _lines(
    page: Drawing,
    x: float,
    y: float,
    width: float,
    height: float,
    lines: tuple[str, ...],
    *,
    kind: str,
) -> None:
    """A box with one sentence over its lines."""
    page.box(x, y, width, height, kind=kind)
    top = y + height / 2 - 8.5 * (len(lines) - 1) + 4.5
    for number, line in enumerate(lines):
        if len(line) * 13 * CHARACTER > width - 8:
            raise ValueError(f"{line!r} is too long")
        place = (x + width / 2, top + 17 * number)
        page.text(*place, line, kind=f"on-{kind}", size=13, anchor="middle")


DIAGRAMS: dict[str, Diagram] = {
    "overview": overview,
    "adapter": adapter,
    "request": request,
    "batch": batch,
    "prompts": prompts,
    "swap": swap,
    "tiers": tiers,
    "processes": processes,
    "rollout": rollout,
    "choosing": choosing,
    "accuracy": accuracy,
}


def main() -> None:
    """Write all of them beside this file."""
    for name, diagram in DIAGRAMS.items():
        path = Path(__file__).with_name(f"{name}.svg")
        path.write_text(diagram().svg(), "utf-8")
        sys.stdout.write(f"{path.name}\n")


if __name__ == "__main__":
    main()
