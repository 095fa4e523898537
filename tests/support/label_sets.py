"""Small learnable data whose texts have sets of labels."""

import json
import random
from pathlib import Path

from train.data.dataset import Dataset, Example

# A text has a label for each of these words in it.
LABEL_OF = {"good": "praise", "bad": "fault", "card": "card"}
LABELS = tuple(sorted(LABEL_OF.values()))
_SHARES = {"good": 0.5, "bad": 0.35, "card": 0.2}


def label_sets(rows: int, *, seed: int) -> Dataset:
    """Texts with some of three words, perhaps none, among others."""
    draw = random.Random(seed)
    return Dataset(f"sets-{seed}", f"{seed:064x}", tuple(_example(draw) for _ in range(rows)))


def _example(draw: random.Random) -> Example:
    chosen = [
        word
        for word, share in (("good", 0.5), ("bad", 0.35), ("card", 0.2))
        if draw.random() < share
    ]
    words = [draw.choice(("the", "my", "call", "you", "now")) for _ in range(draw.randint(1, 4))]
    words += chosen
    draw.shuffle(words)
    return Example(" ".join(words), None, tuple(sorted(LABEL_OF[word] for word in chosen)))


def write_jsonl(path: Path, data: Dataset) -> Path:
    """A file with a list of labels in every row."""
    rows = ({"text": row.text, "label": list(row.labels)} for row in data.examples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
