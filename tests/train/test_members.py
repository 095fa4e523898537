"""Every member of the family: `fit` writes it, and its file answers as the trained method does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.adapter import classify, prepare, rows_of
from adapters.format.files import Adapter, load_adapter
from tests.support import families
from tests.support.families import backbone_of
from tests.support.training import RecordingProgress, fitted, settings_of
from train.cli import main
from train.config.defaults import check_method, design_of
from train.config.settings import FitSettings, MethodName, StorageType
from train.errors import SettingsError
from train.fit.best import CANDIDATES, is_better
from train.loop.loop import RowCounts
from train.loop.trunk_cache import TrunkCache
from train.methods import METHODS, build
from train.methods.method import AdapterMethod

TRAINED = [method for method in MethodName if method is not MethodName.BEST]
TEXTS = ("good card", "free win now, bad plot the card is my card", "bad", "not bad at all")
EXPECTED = {
    "idspam": ("attention", None),
    "idspam+vectors": ("attention", "vectors"),
    "vectors": (None, "vectors"),
    "lora": (None, "lora"),
    "head-only": (None, None),
    "prompt-tuning": ("static", None),
    "p-tuning": ("static", None),
    "smop": ("routed", None),
    "lpt": ("first-token", None),
    "dept": ("static", None),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    families.save("bert", folder)
    return str(folder)


def parts(adapter: Adapter) -> tuple[str | None, str | None]:
    """The kinds of its prompt and tuning."""
    prompt, tuning = adapter.spec.prompt, adapter.spec.tuning
    return (
        None if prompt is None else prompt.kind,
        None if tuning is None else tuning.kind,
    )


def no_states_left(folder: Path) -> bool:
    """Whether a run's own files are gone."""
    return not [
        path for path in folder.iterdir() if ".state" in path.name or ".search" in path.name
    ]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_answers_as_its_method(name: str, family: str) -> None:
    backbone = backbone_of(family)
    design = design_of(name, FitSettings(max_length=24, prompt_length=3), backbone)
    method = build(name, backbone, design, ("a", "b", "c"), torch.Generator().manual_seed(0)).eval()
    assert isinstance(method, AdapterMethod)
    random = torch.Generator().manual_seed(1)
    for tensor in method.tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=random) * 0.15)
    encodings = [backbone.encoder.encode(text, None, max_length=24) for text in TEXTS]
    cache = TrunkCache(
        backbone, encodings, method.shape, trunk_layers=method.trunk_layers, place="off"
    )
    everything = list(range(len(TEXTS)))
    batch = cache.pack(everything)
    logits = method(batch, cache.trunk(everything, batch))[torch.from_numpy(batch.order.argsort())]
    folded = method.folded()
    adapter = folded.adapter(folded.spec)
    prepared = [prepare(adapter, backbone)]
    rows = rows_of(prepared, [(0, encoding) for encoding in encodings])
    answers = classify(backbone, backbone.pack(rows), prepared)
    np.testing.assert_allclose(
        np.stack([answer.scores for answer in answers]), logits.softmax(-1).numpy(), atol=1e-5
    )
    assert float(logits.std(dim=0).min()) > 0.01, "texts get different answers"


def test_every_method_is_an_adapter_but_two() -> None:
    without = {name for name, kind in METHODS.items() if kind.not_an_adapter is not None}
    assert without == {"idpg", "fine-tuning"}
    assert set(EXPECTED) == set(TRAINED)
    assert METHODS.keys() >= set(TRAINED)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_fit_writes_every_kind(name: str, bert: str, tmp_path: Path) -> None:
    settings = settings_of(bert, method=MethodName(name), epochs=2, learning_rate=None)
    report, adapter = fitted(settings, tmp_path / "a.safetensors")
    assert parts(adapter) == EXPECTED[name]
    assert report.settings["method"] == name
    assert no_states_left(tmp_path)


@pytest.mark.slow
def test_the_literal_method_has_no_vectors(bert: str, tmp_path: Path) -> None:
    _, adapter = fitted(settings_of(bert, preset="paper", epochs=1), tmp_path / "a.safetensors")
    assert parts(adapter) == ("attention", None)
    _, adapter = fitted(settings_of(bert, epochs=1), tmp_path / "b.safetensors")
    assert parts(adapter) == ("attention", "vectors")


@pytest.mark.slow
def test_lora_has_the_rank_sites_and_layers_asked_for(bert: str, tmp_path: Path) -> None:
    asked = {"rank": 3, "alpha": 9.0, "sites": "down, query", "tuned_layers": "1-2"}
    settings = settings_of(bert, method=MethodName.LORA, epochs=1, **asked)
    report, adapter = fitted(settings, tmp_path / "a.safetensors")
    tuning: Any = adapter.spec.tuning
    assert (tuning.rank, tuning.scaling, tuning.layers) == (3, 3.0, (1, 3))
    assert tuning.sites == ("query", "down")
    assert report.settings["tuned_layers"] == "1-2"
    # Starting from it needs no more than the file.
    again = settings_of(None, init_from=str(tmp_path / "a.safetensors"), epochs=1)
    recorded = RecordingProgress()
    _, other = fitted(again, tmp_path / "b.safetensors", recorded)
    assert other.spec.tuning == tuning
    assert any("its matrices and head" in note for note in recorded.notes)


@pytest.mark.slow
def test_a_prompt_is_a_start_for_a_prompt_with_vectors(bert: str, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    fitted(settings_of(bert, method=MethodName.IDSPAM, epochs=1), source)
    settings = settings_of(
        None,
        init_from=str(source),
        method=MethodName.IDSPAM_VECTORS,
        epochs=1,
        learning_rate=1e-12,
        weight_decay=0.0,
        storage_dtype=StorageType.FLOAT32,
    )
    _, adapter = fitted(settings, tmp_path / "b.safetensors")
    before = load_adapter(source).tensors
    assert parts(adapter) == ("attention", "vectors")
    for name, tensor in before.items():
        torch.testing.assert_close(adapter.tensors[name], tensor.float(), atol=1e-6, rtol=0)
    with pytest.raises(SettingsError, match=r"--init-from .*: --method vectors: its is idspam"):
        fitted(
            settings_of(None, init_from=str(source), method=MethodName.VECTORS),
            tmp_path / "c.safetensors",
        )


@pytest.mark.slow
def test_best_keeps_one_of_several_methods_and_says_which(bert: str, tmp_path: Path) -> None:
    settings = settings_of(bert, method=MethodName.BEST, learning_rate=None, epochs=3)
    report, adapter = fitted(settings, tmp_path / "a.safetensors")
    assert [trial.settings["method"] for trial in report.trials] == list(CANDIDATES)
    (kept,) = [trial for trial in report.trials if trial.chosen]
    assert report.settings["method"] == kept.settings["method"]
    assert parts(adapter) == EXPECTED[kept.settings["method"]]
    card = (tmp_path / "a.md").read_text()
    assert all(f"{method}" in card for method in CANDIDATES)
    assert no_states_left(tmp_path)


def test_a_dearer_method_must_be_better_than_chance_explains() -> None:
    """Both answer the same rows: what counts is where they differ, not how hard the rows are."""

    def answers(*right: int) -> RowCounts:
        return RowCounts(list(right), [2] * len(right))

    kept = answers(*[1] * 80, *[0] * 20)
    # Three rows more: twelve corrected and nine spoilt, or three corrected and none spoilt.
    mixed = answers(*[0] * 9, *[1] * 71, *[1] * 12, *[0] * 8)
    few = answers(*[1] * 80, *[1] * 3, *[0] * 17)
    many = answers(*[1] * 80, *[1] * 9, *[0] * 11)
    assert not is_better(mixed, kept)
    assert not is_better(kept, kept)
    assert not is_better(kept, many)
    # Unpaired, 0.89 is within the interval of 0.80 on a hundred rows.
    assert is_better(many, kept)
    assert not is_better(few, kept)


def test_sets_of_labels_are_compared_by_micro_f1() -> None:
    kept = RowCounts([1, 0] * 200, [4, 2] * 200)
    better = RowCounts([2, 0] * 200, [4, 2] * 200)
    assert is_better(better, kept)
    assert not is_better(kept, better)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "lora", "--rank", "65"], "--rank must be at most 64, not 65"),
        (["--method", "lora", "--rank", "0"], "--rank must be at least 1, not 0"),
        (["--method", "lora", "--sites", "ffn"], "--sites ffn: ffn is none of query, key, value"),
        (["--method", "lora", "--sites", "query,query"], "--sites query,query: query twice"),
        (["--method", "lora", "--sites", "activated"], "activated is none of"),
        (["--tuned-layers", "3-1"], "--tuned-layers 3-1: the first layer is above the last one"),
        (["--tuned-layers", "all"], "--tuned-layers all: expected FIRST-LAST, as in 0-5"),
        (["--tuned-layers", "1-4"], "--tuned-layers 1-4: this backbone has layers 0..3"),
        (["--method", "vectors", "--prompt-length", "4"], "--method vectors has no such setting"),
        (["--rank", "4"], "--rank 4: --method idspam+vectors has no such setting; lora, best have"),
        (["--method", "vectors", "--preset", "paper"], "--preset paper: --method vectors has no"),
        (
            ["--generator-pooling", "mean", "--attention-size", "8"],
            "--attention-size 8: --generator-pooling mean has no queries and keys",
        ),
        (["--method", "best", "--search", "2"], "--method best trains several methods: --search"),
        (["--method", "best", "--validation-fraction", "0"], "and there are none"),
        (["--method", "idpg"], "argument --method: invalid choice: 'idpg'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line_and_nothing_is_written(
    flags: list[str],
    message: str,
    bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["text,label", *(f"text {index},{'ab'[index % 2]}" for index in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    argv = ["fit", "--train", "rows.csv", "--output", "x.safetensors", "--backbone", bert]
    try:
        code = main([*argv, "--quiet", *flags])
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert len(lines) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_method_takes_its_own_settings() -> None:
    check_method(FitSettings(method=MethodName.LORA, rank=4, sites="query", tuned_layers="0-1"))
    check_method(FitSettings(method=MethodName.BEST, rank=4, prompt_length=3))
