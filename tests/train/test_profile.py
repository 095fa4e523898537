"""`fit` writes the profile of its held-out rows, and `profile` one of rows that it is given."""

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest

from adapters.format.files import load_adapter
from adapters.format.spec import AdapterSpec
from tests.support import families
from tests.support.label_sets import LABELS, label_sets
from tests.support.training import TEST, TRAIN, VALIDATION, dataset, is_same, settings_of
from train.config.settings import ComputeType
from train.data.dataset import Dataset
from train.fit.fit import fit
from train.fit.profile import add_profile
from train.loop.progress import Progress
from train.report.evaluation import Evaluation, evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    families.save("bert", folder)
    return str(folder)


@pytest.fixture(scope="module")
def made(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of one quick run, with validation rows."""
    output = tmp_path_factory.mktemp("made") / "a.safetensors"
    fit(TRAIN, VALIDATION, TEST, settings_of(backbone, epochs=2), output, Progress())
    return output


def served(adapter: Path, data: Dataset, backbone: str) -> Evaluation:
    return evaluate(
        adapter,
        data,
        backbone=backbone,
        device="cpu",
        dtype=ComputeType.FLOAT32,
        progress=Progress(),
    )


def test_a_fit_counts_what_the_adapter_answers_to_its_validation_rows(
    made: Path, backbone: str
) -> None:
    profile = load_adapter(made).spec.profile
    assert profile is not None
    assert (profile.source, profile.rows) == ("validation", len(VALIDATION))
    evaluation = served(made, VALIDATION, backbone)
    assert list(profile.labels) == evaluation.predicted.bincount(minlength=2).tolist()
    best = evaluation.scores.max(dim=1).values
    edges = [0.0, *profile.confidence.edges, 2.0]
    expected = [int(((best >= low) & (best < high)).sum()) for low, high in pairwise(edges)]
    assert list(profile.confidence.counts) == expected
    assert sum(profile.length.counts) == len(VALIDATION)


def test_without_validation_rows_the_test_rows_are_counted_and_without_both_there_is_none(
    backbone: str, tmp_path: Path
) -> None:
    settings = settings_of(backbone, epochs=1, validation_fraction=0.0)
    fit(TRAIN, None, TEST, settings, tmp_path / "t.safetensors", Progress())
    profile = load_adapter(tmp_path / "t.safetensors").spec.profile
    assert profile is not None
    assert (profile.source, profile.rows) == ("test", len(TEST))
    fit(TRAIN, None, None, settings, tmp_path / "n.safetensors", Progress())
    assert load_adapter(tmp_path / "n.safetensors").spec.profile is None


def test_sets_of_labels_are_counted_by_label(backbone: str, tmp_path: Path) -> None:
    output = tmp_path / "sets.safetensors"
    validation = label_sets(40, seed=2)
    settings = settings_of(backbone, epochs=2)
    fit(label_sets(90, seed=1), validation, None, settings, output, Progress())
    profile = load_adapter(output).spec.profile
    assert profile is not None
    assert len(profile.labels) == len(LABELS)
    predicted = served(output, validation, backbone).predicted
    assert list(profile.labels) == predicted.sum(dim=0).tolist()
    assert profile.unlabelled == int((~predicted.any(dim=1)).sum())


def test_a_profile_is_written_into_a_file_and_changes_nothing_else(
    made: Path, backbone: str, tmp_path: Path
) -> None:
    before, output = load_adapter(made), tmp_path / "b.safetensors"
    content = made.read_bytes()
    data = dataset(60, seed=9)
    profile = add_profile(
        made,
        data,
        output,
        backbone=backbone,
        device="cpu",
        dtype=ComputeType.FLOAT32,
        progress=Progress(),
    )
    assert made.read_bytes() == content
    after = load_adapter(output)
    assert after.spec.profile == profile
    assert (profile.source, profile.rows) == ("given", 60)
    assert is_same(before, after)
    same = {"profile": None}
    assert after.spec.model_copy(update=same) == before.spec.model_copy(update=same)
    # The same rows are the same bytes.
    again = tmp_path / "c.safetensors"
    add_profile(
        output,
        data,
        again,
        backbone=backbone,
        device="cpu",
        dtype=ComputeType.FLOAT32,
        progress=Progress(),
    )
    assert (
        hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(output.read_bytes()).digest()
    )
    assert AdapterSpec.from_json(after.spec.to_json()) == after.spec


@pytest.mark.parametrize("with_card", [True, False])
def test_the_model_card_of_an_adapter_names_it_as_it_is_after_a_new_profile(
    made: Path, backbone: str, tmp_path: Path, with_card: bool
) -> None:
    adapter, card = tmp_path / "a.safetensors", tmp_path / "a.md"
    adapter.write_bytes(made.read_bytes())
    before = made.with_suffix(".md").read_text() if with_card else "# My notes\n"
    card.write_text(before)
    add_profile(
        adapter,
        TRAIN,
        adapter,
        backbone=backbone,
        device="cpu",
        dtype=None,
        progress=Progress(),
    )
    old, new = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (made, adapter))
    assert old != new
    after = card.read_text()
    if with_card:
        assert old in before
        assert new in after
        assert f"| bytes | {adapter.stat().st_size} |" in after
        before = before.replace(old, new)
        size = f"| bytes | {made.stat().st_size} |"
        before = before.replace(size, f"| bytes | {adapter.stat().st_size} |")
    assert after == before
