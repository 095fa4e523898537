"""The corpus of the fuzzers, replayed without atheris: each of its inputs once met a reader."""

from pathlib import Path

import pytest

from tests.fuzz.harnesses import HARNESSES

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path for name in HARNESSES for path in (CORPUS / name).iterdir())


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_is_read_or_refused(path: Path) -> None:
    valid = HARNESSES[path.parent.name](path.read_bytes())
    if path.name.startswith("valid"):
        assert valid


@pytest.mark.parametrize("name", HARNESSES)
def test_a_corpus_has_inputs_that_are_valid_and_that_are_not(name: str) -> None:
    answers = {HARNESSES[name](path.read_bytes()) for path in (CORPUS / name).iterdir()}
    assert answers == {True, False}


@pytest.mark.parametrize("name", HARNESSES)
def test_every_piece_of_the_corpus_is_read_or_refused(name: str) -> None:
    """Cheap mutations: cut anywhere, one byte changed."""
    for path in (CORPUS / name).iterdir():
        data = path.read_bytes()
        step = max(1, len(data) // 25)
        for place in range(0, len(data), step):
            HARNESSES[name](data[:place])
            HARNESSES[name](data[:place] + bytes([data[place] ^ 0x21]) + data[place + 1 :])
