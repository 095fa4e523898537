"""Rebuild the adapters of adapters/zoo: `python -m train.zoo --help`.

Every adapter is one `fit` with default settings; this file says where its data comes from. The data
of `sentiment` are the rated snippets in the source distribution of the PyPI package vaderSentiment
3.3.2 (MIT).
"""

import argparse
import gzip
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train import cli
from train.report.data_checks import repeats_path, suspects_path

SNIPPETS = ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")
HELD_OUT_FROM = "movieReviewSnippets"
# Ratings go from -4 to 4; closer to zero than this, the raters disagreed on the sign.
LEAST_RATING = 0.5
# Percent of the movie snippets, chosen by a hash of the text.
TEST_PERCENT, VALIDATION_PERCENT = 15, 10


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter's data comes from: the folder with its splits, its name and its licence."""

    folder: str
    data: str
    licence: str


ZOO = {
    "sms-spam": Source(
        "sms_spam", "UCI SMS Spam Collection", "free for all purposes (its authors)"
    ),
    "banking77": Source("banking77", "PolyAI BANKING77", "CC BY 4.0"),
    "clinc150": Source("clinc150", "CLINC150, full version with out-of-scope", "CC BY 3.0"),
    "sentiment": Source("sentiment", "VADER rated snippets (vaderSentiment 3.3.2)", "MIT"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit the chosen adapters one after the other; returns the first exit code that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m train.zoo", description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="holds TASK/SPLIT.jsonl.gz")
    parser.add_argument(
        "--output", type=Path, default=Path("adapters/zoo"), help="adapters' folder"
    )
    parser.add_argument("--only", choices=sorted(ZOO), action="append", help="may be repeated")
    parser.add_argument(
        "--snippets", type=Path, help="hutto_ICWSM_2014.tar.gz: write DATA_ROOT/sentiment from it"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own default if not given")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    if options.snippets is not None:
        write_snippets(options.snippets, options.data_root / "sentiment")
    for name in options.only or ZOO:
        code = cli.main(fit_arguments(name, options.data_root, options.output))
        if code != 0:
            return code
        # They hold rows of the data, which the zoo must not publish.
        for list_of_rows in (repeats_path, suspects_path):
            list_of_rows(options.output / f"{name}.safetensors").unlink(missing_ok=True)
    return 0


def fit_arguments(name: str, data_root: Path, output: Path) -> list[str]:
    """The arguments of the `fit` command that makes an adapter of the zoo."""
    source = ZOO[name]
    splits = [
        part
        for split in ("train", "validation", "test")
        for part in (f"--{split}", str(data_root / source.folder / f"{split}.jsonl.gz"))
    ]
    return [
        "fit",
        *splits,
        *("--output", str(output / f"{name}.safetensors")),
        *("--report", str(output / f"{name}.json")),
        *("--data-name", source.data),
        *("--data-licence", source.licence),
    ]


def write_snippets(archive: Path, folder: Path) -> None:
    """Write labelled splits from rated snippets: positive above `LEAST_RATING`, negative below its
    negative; the others are dropped.

    Only movie snippets are held out, so validation and test rows are all movie snippets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for split, text, label in _snippets(archive):
        lines[split].append(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
    for split, content in lines.items():
        # No time stamp: the same archive always gives the same bytes and the same hash.
        with gzip.GzipFile(folder / f"{split}.jsonl.gz", "wb", mtime=0) as file:
            file.write("".join(content).encode())


def _snippets(archive: Path) -> Iterator[tuple[str, str, str]]:
    seen: set[str] = set()
    with tarfile.open(archive) as tar:
        for name in SNIPPETS:
            member = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert member is not None, f"{archive} does not hold {name}"
            for line in member.read().decode("latin-1").splitlines():
                _, rating, text = line.split("\t")
                if abs(float(rating)) <= LEAST_RATING or text in seen:
                    continue
                seen.add(text)
                split = _split(text) if name == HELD_OUT_FROM else "train"
                yield split, text, "positive" if float(rating) > 0 else "negative"


def _split(text: str) -> str:
    percent = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    if percent < TEST_PERCENT:
        return "test"
    return "validation" if percent < TEST_PERCENT + VALIDATION_PERCENT else "train"


if __name__ == "__main__":
    sys.exit(main())
