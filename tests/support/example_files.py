"""The files that the examples of the pages read: made up here, and the same every time.

Their texts are put together from sentences, so that an adapter learns them within seconds.
`make example-files` writes them for a reader.
"""

import csv
import gzip
import json
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from adapters.format.files import load_adapter, save_adapter

TREE = Path(__file__).resolve().parents[2]
ZOO = TREE / "adapters" / "zoo"
# Sorted: the first of them are there in every run.
DESKS = (
    "bags", "beds", "bikes", "books", "cameras", "carpets", "chairs", "clocks", "coffee",
    "games", "garden", "hats", "kitchen", "knives", "lamps", "mugs", "music", "paint", "pens",
    "pets", "phones", "plants", "shoes", "soap", "sports", "tents", "tools", "toys", "watches",
    "wine",
)  # fmt: skip
_MATTERS: Mapping[str, Sequence[str]] = {
    "billing": (
        "the invoice shows the wrong amount",
        "my card was charged twice",
        "I was billed for something that I never ordered",
        "the discount is missing on the bill",
        "when do I get the refund on my account",
        "the payment was taken although I had cancelled",
        "your receipt has no tax number on it",
        "the bank says that the direct debit failed",
    ),
    "delivery": (
        "the parcel has not arrived yet",
        "the courier left the box at the wrong door",
        "tracking has said in transit for a week",
        "can you ship to another address",
        "the driver never rang the bell",
        "when will the shipment come",
        "half of the order is still on its way",
        "the package was sent back to the depot",
    ),
    "defect": (
        "it broke on the first day",
        "the handle came off",
        "there is a crack in it",
        "it stopped working after an hour",
        "one part does not fit the other",
        "it makes a loud noise and then switches off",
        "the surface is scratched all over",
        "it leaks at the bottom",
    ),
}
_RARE = (
    "how long does the guarantee last",
    "does the warranty cover the battery",
    "is the guarantee valid abroad",
    "please extend my warranty",
    "where do I register for the guarantee",
    "the warranty card was not in the box",
)
_BEFORE = (
    "Hello,", "Good morning,", "Hi there,", "To whom it may concern:", "Dear team,", "Again,",
    "Sorry to bother you, but", "As I wrote last week,", "My neighbour says I should tell you:",
)  # fmt: skip
_ABOUT = (
    "This is about the {0} from your spring sale.",
    "I bought the {0} as a present for my sister.",
    "We have ordered {0} from you for years.",
    "It concerns the blue {0} in your window.",
    "I found the {0} in your catalogue.",
    "My son picked the {0} himself.",
    "The {0} was on the second page of the list.",
)
_AFTER = (
    "Please answer soon.", "Thank you!", "What shall I do?", "I am on holiday from Monday on.",
    "Can somebody call me?", "Kind regards from Leeds", "This is the third time.",
    "I would be glad of a quick reply.", "Yours, an old customer",
)  # fmt: skip
# Faults of a house that one report may have together.
_FAULTS: Mapping[str, Sequence[str]] = {
    "door": ("the front door does not close", "the door is stuck", "the key turns in the door"),
    "light": ("the lamp in the hall flickers", "it is dark on the stairs", "a bulb is dead"),
    "water": ("the tap drips", "there is a puddle under the sink", "no hot water since Monday"),
}
# Between greeting and matter in two texts: more than a model reads.
_LONG = "This message is confidential and meant for the person named above only. " * 24
_CHINESE = ("我的包裹还没有到请尽快告诉我", "发票上的金额不对请更正", "产品第一天就坏了怎么办")


def write_example_files(folder: Path, *, desks: int) -> None:
    """Everything that examples read, in `folder`; `desks` files of training data in tasks/."""
    for name in ("sms-spam", "banking77", "sentiment"):
        shutil.copy(ZOO / f"{name}.safetensors", folder)
    (folder / "sms-spam.md").write_text("# sms-spam\n\nSpam, or not.\n")
    # Another revision of the same adapter: only its history differs.
    spam = load_adapter(ZOO / "sms-spam.safetensors")
    provenance = spam.spec.provenance.model_copy(update={"created": "2026-11-27T12:00:00+00:00"})
    spec = spam.spec.model_copy(update={"provenance": provenance})
    save_adapter(folder / "new.safetensors", replace(spam, spec=spec))
    _write_texts(folder)
    _write_tickets(folder)
    _write_desk(folder)
    _write_faults(folder)
    for name in ("tasks", "held-out", "more"):
        (folder / name).mkdir()
    for number, desk in enumerate(DESKS[:desks]):
        rng = random.Random(100 + number)
        for name, each in (("tasks", 14), ("held-out", 4), ("more", 4)):
            rows = _rows(rng, desk, each)
            _write_rows(folder / name / f"{desk}.csv", rows)
            if name == "held-out":
                texts = "".join(f"{text}\n" for text, _ in rows)
                (folder / name / f"{desk}-texts.txt").write_text(texts)


def _write_texts(folder: Path) -> None:
    texts = ("see you at eight", "WINNER!! Call now to claim your free prize", "a charming film")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    shutil.copy(folder / "texts.txt", folder / "reviews.txt")
    lines = "".join(json.dumps({"text": text, "id": text[:3]}) + "\n" for text in texts)
    for name in ("texts.jsonl", "reviews.jsonl", "in.jsonl"):
        (folder / name).write_text(lines)
    with gzip.open(folder / "mails.jsonl.gz", "wt") as file:
        file.write(lines)
    (folder / "questions.csv").write_text("question\nmy card was charged twice\n")


def _write_tickets(folder: Path) -> None:
    """The rows of docs/examples: the first to train on, and the others as those that came later."""
    with (TREE / "docs" / "examples" / "tickets.csv").open(newline="") as file:
        _, *rows = ((text, label) for text, label in csv.reader(file))
    _write_rows(folder / "tickets.csv", rows[:80])
    for name in ("later", "held_out"):
        _write_rows(folder / f"{name}.csv", rows[80:])


def _write_desk(folder: Path) -> None:
    """Rows with every fault of docs/accuracy.md: desk.csv, and desk-later.csv for the test."""
    rng = random.Random(7)
    rows, later = _rows(rng, "lamp", 20), _rows(rng, "lamp", 8)
    # Wrong labels.
    for number, label in ((4, "defect"), (21, "billing"), (42, "delivery")):
        assert rows[number][1] != label
        rows[number] = (rows[number][0], label)
    rows += [(_text(rng, matter, "lamp"), "warranty") for matter in _RARE]
    later += [(_text(rng, matter, "lamp"), "warranty") for matter in _RARE[:3]]
    # What is read of them says nothing about their label.
    for label in ("billing", "defect"):
        rows.append((f"Hello, {_LONG}{_MATTERS[label][0]}", label))
        later.append((f"Good morning, {_LONG}{_MATTERS[label][1]}", label))
    (folder / "long.txt").write_text(f"{later[-1][0]}\n")
    later += zip(_CHINESE, ("delivery", "billing", "defect"), strict=True)
    # Rows that were measured on and trained on.
    later += rows[10:13]
    _write_rows(folder / "desk.csv", rows)
    _write_rows(folder / "desk-later.csv", later)


def _write_faults(folder: Path) -> None:
    """Texts with none, one or two labels: faults.jsonl, and the same as faults.csv."""
    rng = random.Random(3)
    lines, cells = [], []
    for _ in range(48):
        labels = rng.sample(sorted(_FAULTS), rng.choice((0, 1, 1, 2)))
        matters = [rng.choice(_FAULTS[label]) for label in labels] or ["all is well"]
        text = f"{rng.choice(_BEFORE)} {' and '.join(matters)}. {rng.choice(_AFTER)}"
        lines.append(json.dumps({"text": text, "label": labels}))
        cells.append((text, ";".join(labels)))
    (folder / "faults.jsonl").write_text("".join(f"{line}\n" for line in lines))
    _write_rows(folder / "faults.csv", cells)


def _rows(rng: random.Random, thing: str, each: int) -> list[tuple[str, str]]:
    """Texts and labels, in random order; `each` of every label."""
    rows = [
        (_text(rng, rng.choice(matters), thing), label)
        for label, matters in _MATTERS.items()
        for _ in range(each)
    ]
    rng.shuffle(rows)
    return rows


def _text(rng: random.Random, matter: str, thing: str) -> str:
    parts = [
        rng.choice(_BEFORE),
        f"{matter}.",
        rng.choice(_ABOUT).format(thing),
        rng.choice(_AFTER),
    ]
    return " ".join(parts)


def _write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)


def main(folder: Path) -> int:
    """Write all of them into a folder that has none of them."""
    found = [name for name in ("tasks", "held-out", "more") if (folder / name).exists()]
    if found:
        sys.stderr.write(f"error: {folder / found[0]} exists: nothing is written\n")
        return 2
    write_example_files(folder, desks=len(DESKS))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
