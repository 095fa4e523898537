"""What cannot be imported is refused in one line with code 2, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.peft_models import LABELS, lora, save_base, save_tuned
from train.cli import main

CLASSIFIER = "base_model.model.classifier.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT."""
    return save_base("bert", tmp_path_factory.mktemp("peft") / "bert")


@pytest.fixture(scope="module")
def saved(base: Path) -> Path:
    """A LoRA model on it."""
    return save_tuned(base, lora("bert"), base.parent / "saved")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(saved, tmp_path / "tuned")
    return tmp_path / "tuned"


def refusal(
    folder: Path, capsys: pytest.CaptureFixture[str], *flags: str, labels: tuple[str, ...] = LABELS
) -> str:
    """Import, expect code 2 and one line of error; returns what follows the folder's name."""
    output = folder.parent / "x.safetensors"
    argv = ["import-peft", str(folder), "--output", str(output), *flags, "--labels", *labels]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert not output.exists()
    *notes, line = err.splitlines()
    # What it began to do, if it got that far.
    assert all("loading" in note for note in notes)
    return line.removeprefix("error: ").removeprefix(f"{folder}: ")


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_dora": True}, "cannot be served exactly: use_dora=True (DoRA divides by a norm"),
        ({"bias": "all"}, "cannot be served exactly: bias='all' (trained biases"),
        ({"lora_bias": True}, "cannot be served exactly: lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "cannot be served exactly: init_lora_weights='pissa' (it"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "cannot be served exactly: layer_replication="),
        ({"trainable_token_indices": [1]}, "cannot be served exactly: trainable_token_indices="),
        ({"of_tomorrow": 3}, "cannot be served exactly: of_tomorrow=3 (this PEFT does not know it"),
        (
            {"peft_type": "ADALORA"},
            "peft_type 'ADALORA' cannot be imported; IA3, LORA, PROMPT_TUNING",
        ),
        ({"peft_type": None}, "peft_type None cannot be imported"),
        ({"task_type": "CAUSAL_LM"}, "task_type 'CAUSAL_LM' has no scores for labels"),
        ({"task_type": None}, "task_type None has no scores for labels"),
        ({"target_modules": ["q_proj"]}, "PEFT cannot apply it to "),
        ({"target_modules": 7}, "PEFT cannot apply it to "),
        ({"r": "many"}, "PEFT cannot apply it to "),
        ({"base_model_name_or_path": None}, "names no base model; --backbone says"),
        ({"base_model_name_or_path": "/no/such/bert"}, "its base model is /no/such/bert, which is"),
        ({"base_model_name_or_path": 5}, "names no base model; --backbone says"),
    ],
)
def test_settings_that_cannot_be_served_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], expected: str
) -> None:
    configure(folder, **fields)
    assert refusal(folder, capsys).startswith(expected)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), "has no adapter_config.json; PEFT"),
        (
            lambda path: path.joinpath("adapter_config.json").rename(
                Path(shutil.copytree(path, path / "first")) / "adapter_config.json"
            ),
            "has no adapter_config.json, but these folders in it have one: first",
        ),
        (
            lambda path: path.joinpath("adapter_model.safetensors").rename(
                path / "adapter_model.bin"
            ),
            "has only adapter_model.bin, a pickle, which can run code",
        ),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "has no adapter_model."),
        (shutil.rmtree, "not a folder"),
    ],
)
def test_a_folder_without_its_files_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    expected: str,
) -> None:
    spoil(folder)
    assert refusal(folder, capsys).startswith(expected)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"\xff"),
        ("adapter_model.safetensors", b"\x80\x04"),
        ("config.json", b"3"),
    ],
)
def test_a_file_that_is_something_else_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (folder / name).write_bytes(content)
    assert refusal(folder, capsys).startswith(f"{folder}/{name}: not ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop(CLASSIFIER), f"has no head: {CLASSIFIER} is missing"),
        (
            lambda tensors: tensors.update({CLASSIFIER: torch.tensor(1.0)}),
            "the weights do not fit a bert of 4 layers, ",
        ),
        (
            lambda tensors: tensors.update(
                {
                    name: tensor[:3].contiguous()
                    for name, tensor in tensors.items()
                    if "lora_A" in name
                }
            ),
            "the weights do not fit a bert of 4 layers, ",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.bert.embeddings.x": torch.ones(2)}),
            "the weights do not fit a bert of 4 layers, ",
        ),
        (
            lambda tensors: tensors.update({CLASSIFIER: torch.full((3, 24), torch.nan)}),
            f"{CLASSIFIER} has a value that is not finite",
        ),
        (
            lambda tensors: tensors.update({CLASSIFIER: torch.ones(3, 24, dtype=torch.int8)}),
            f"{CLASSIFIER} is int8: quantised weights are not taken",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], object],
    expected: str,
) -> None:
    rewrite(folder, change)
    line = refusal(folder, capsys)
    assert line.removeprefix(f"{folder}/adapter_model.safetensors: ").startswith(expected)


def test_a_missing_layer_of_weights_is_counted_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "base_model.model.bert.encoder.layer.3.attention.self.value.lora_B.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert refusal(folder, capsys).endswith(f": missing tensors: 1, the first is {name}")


def test_labels_and_lengths_must_fit_the_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(folder, capsys, labels=("a", "b")) == "the head has 3 outputs, --labels 2"
    assert "labels must be distinct" in refusal(folder, capsys, labels=("a", "b", "b"))
    assert refusal(folder, capsys, "--max-length", "49").startswith(
        "--max-length 49; the backbone has room for 48 tokens"
    )
    assert "max_length" in refusal(folder, capsys, "--max-length", "1")
    assert refusal(folder, capsys, "--end-token") == (
        "--end-token is for GPT-2, the base model is a bert"
    )


def test_another_base_model_is_refused_by_name_by_weights_and_by_shape(
    folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(save_base("bert", tmp_path / "other", seed=5))
    named = refusal(folder, capsys, "--backbone", other)
    assert named == f"trained on {base}, whose weights are not those of {other}"
    configure(folder, base_model_name_or_path="someone/else")
    assert "add --same-base-model" in refusal(folder, capsys, "--backbone", str(base))
    roberta = str(save_base("roberta", tmp_path / "roberta"))
    line = refusal(folder, capsys, "--backbone", roberta, "--same-base-model")
    assert line.startswith("the weights do not fit a roberta of 4 layers, ")
    assert "unknown tensors: 18, the first is base_model.model.bert.encoder" in line


def test_a_copy_of_the_base_model_is_the_base_model(
    folder: Path, base: Path, tmp_path: Path
) -> None:
    copied = str(shutil.copytree(base, tmp_path / "copied"))
    argv = ["import-peft", str(folder), "--backbone", copied, "--labels", *LABELS, "--output"]
    assert main([*argv, str(tmp_path / "x.safetensors")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            lora("bert", modules_to_save=["encoder.layer.0.output.dense"]),
            "modules_to_save has bert.encoder.layer.0.output.dense, and ",
        ),
        (lora("bert", r=65), "rank 65; at most 64 can be served"),
        (
            lora("bert", target_modules=["query", "word_embeddings"]),
            "changes bert.embeddings.word_embeddings, which is neither in a layer nor part of ",
        ),
        (
            peft.IA3Config(
                task_type=peft.TaskType.SEQ_CLS,
                target_modules=["value", "output.dense"],
                feedforward_modules=[],
            ),
            "IA3 scales the output of attention.output.dense, which vectors cannot",
        ),
        (
            peft.PrefixTuningConfig(task_type=peft.TaskType.SEQ_CLS, num_virtual_tokens=3),
            "peft_type 'PREFIX_TUNING' cannot be imported",
        ),
        (
            peft.PromptTuningConfig(task_type=peft.TaskType.SEQ_CLS, num_virtual_tokens=47),
            "47 virtual tokens; at most 46 can be served",
        ),
    ],
)
def test_models_that_change_something_else_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, expected: str
) -> None:
    folder = save_tuned(base, config, tmp_path / "tuned")
    assert refusal(folder, capsys).startswith(expected)


def test_a_pooler_that_was_random_in_training_is_lost(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    rewrite_model = load_file(bare / "model.safetensors")
    kept = {name: tensor for name, tensor in rewrite_model.items() if "pooler" not in name}
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    folder = save_tuned(bare, lora("bert"), tmp_path / "lost")
    assert "train with modules_to_save=['pooler']" in refusal(folder, capsys)
    folder = save_tuned(bare, lora("bert", modules_to_save=["pooler"]), tmp_path / "kept")
    argv = ["import-peft", str(folder), "--labels", *LABELS, "--output"]
    assert main([*argv, str(tmp_path / "x.safetensors")]) == 0


def test_a_regression_has_no_labels(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tuned(base, lora("bert"), tmp_path / "tuned", labels=1)
    assert refusal(folder, capsys, labels=("spam",)).startswith("a regression has no labels")
