"""`python -m service drift` as it is typed, asking a real service."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import Drift, DriftBin, DriftQuantity
from service.commands.drift import described
from tests.support.http_service import RunningService, serve
from tests.support.profiles import profiled, strange_texts, usual_texts
from tests.support.tiny_models import make_adapter, make_backbone
from tests.support.typed_commands import refused, typed


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    backbone = make_backbone()
    adapter = profiled(make_adapter(backbone, seed=1), backbone, usual_texts(200))
    with serve(tmp_path_factory.mktemp("adapters"), UNCERTAIN_TEXTS="5") as running:
        running.put("a", adapter)
        running.predict(adapter="a", inputs=strange_texts(150))
        yield running


@pytest.mark.slow
def test_what_has_moved_is_shown_and_texts_are_saved(live: RunningService, tmp_path: Path) -> None:
    def drift(*words: str) -> str:
        done = typed("drift", "a", *words, "--url", live.url, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    shown = drift().splitlines()
    assert shown[0].startswith("a ")
    assert shown[1].startswith("150 texts since 20")
    (length,) = (line for line in shown if line.startswith("length") and "training" not in line)
    assert length.endswith("large")
    assert max(map(len, shown)) <= 40
    assert json.loads(drift("--json"))["texts"] == 150
    assert drift("--uncertain", "next.csv") == "written: next.csv\n"
    assert (tmp_path / "next.csv").read_text().startswith("text,label,answer,certainty,time")
    words = ("drift", "a", "--url", live.url)
    assert "may have labels by now" in refused(*words, "--uncertain", "next.csv", folder=tmp_path)
    assert "must end in .csv or .jsonl" in refused(*words, "--uncertain", "x.txt", folder=tmp_path)
    assert drift("--forget") == "a: the texts are forgotten\n"
    assert drift("--uncertain", "none.jsonl") == "written: none.jsonl\n"
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_of_many_labels_those_that_changed_most_are_shown() -> None:
    bins = tuple(
        DriftBin(f"a rather long label of number {number}", 0.05, 0.05) for number in range(19)
    )
    label = DriftQuantity(
        "label", 0.4, 0.02, "large", (*bins, DriftBin("new", 0.01, 0.3), DriftBin("old", 0.2, 0.0))
    )
    drift = Drift("a", "0" * 64, 500, "2026-11-27T12:00:00+00:00", 1000, (label,))
    few = described(drift, every=False)
    assert few[-1] == "and 16 more: --all"
    assert few[-6].split() == ["new", "1.0%", "30.0%"]
    assert few[-5].split() == ["old", "20.0%", "0.0%"]
    assert len(described(drift, every=True)) == len(few) + 16 - 1


def test_without_a_comparison_the_reason_is_shown() -> None:
    drift = Drift("a", "0" * 64, 3, None, 0, (), "the adapter's file has no profile")
    assert described(drift, every=False)[-1] == "the adapter's file has no profile"
