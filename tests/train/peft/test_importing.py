"""What PEFT has saved answers here as it does there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import load_adapter, serialize, validate
from adapters.format.spec import LoraTuning, Site
from tests.support.families import FAMILY_NAMES
from tests.support.peft_models import (
    EVERY_LAYER,
    FLOAT32_BOUND,
    LABELS,
    PAIR,
    TEXTS,
    TRAINED_CLASSES,
    lora,
    peft_scores,
    prompt_sizes,
    save_base,
    save_tuned,
    served_scores,
    train_with_peft,
)
from train.cli import main
from train.peft.importing import import_peft

IA3: dict[str, dict[str, Any]] = {
    **{
        family: {
            "target_modules": ["query", "key", "value", "intermediate.dense", "output.dense"],
            "feedforward_modules": ["output.dense"],
        }
        for family in ("bert", "roberta", "xlm-roberta", "electra")
    },
    "distilbert": {
        "target_modules": ["k_lin", "v_lin", "lin2"],
        "feedforward_modules": ["lin2"],
    },
    "gpt2": {
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "feedforward_modules": ["c_proj"],
    },
}


def _patterns(family: str) -> Any:
    first = EVERY_LAYER[family].rsplit("(", 1)[1].split("|")[0]
    return lora(
        family,
        target_modules=EVERY_LAYER[family],
        use_rslora=True,
        rank_pattern={rf".*1\..*{first}": 7},
        alpha_pattern={rf".*2\..*{first}": 3},
    )


def _some_layers(family: str) -> Any:
    return lora(family, layers_to_transform=[1, 2])


def _ia3(family: str) -> Any:
    return peft.IA3Config(
        task_type=peft.TaskType.SEQ_CLS, fan_in_fan_out=family == "gpt2", **IA3[family]
    )


def _prompt_tuning(family: str) -> Any:
    config: Any = peft.PromptTuningConfig
    return config(task_type=peft.TaskType.SEQ_CLS, num_virtual_tokens=5, **prompt_sizes(family))


def _p_tuning(family: str) -> Any:
    config: Any = peft.PromptEncoderConfig
    return config(
        task_type=peft.TaskType.SEQ_CLS,
        num_virtual_tokens=4,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM" if family == "roberta" else "MLP",
        **prompt_sizes(family),
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model of every family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(family, root / family) for family in FAMILY_NAMES}


# PEFT saves what P-tuning's encoder makes, so it is the same file for every family.
CASES = [
    *((family, _patterns) for family in FAMILY_NAMES),
    *((family, _prompt_tuning) for family in FAMILY_NAMES),
    # RoBERTa, XLM-RoBERTa and ELECTRA have the names of BERT's layers.
    *((family, _ia3) for family in ("bert", "distilbert", "gpt2")),
    *((family, lora) for family in ("bert", "gpt2")),
    *((family, _p_tuning) for family in ("bert", "roberta")),
    *((family, _some_layers) for family in ("bert", "gpt2")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "config"), CASES)
def test_an_imported_adapter_answers_as_peft_does(
    bases: dict[str, Path], tmp_path: Path, family: str, config: Callable[[str], Any]
) -> None:
    folder = save_tuned(bases[family], config(family), tmp_path / "tuned")
    imported = import_peft(folder, LABELS)
    adapter = validate(serialize(imported.adapter))
    # GPT-2's tokenizer puts nothing between two texts.
    texts = TEXTS if family == "gpt2" else (*TEXTS, PAIR)
    theirs = peft_scores(bases[family], folder, texts)
    ours = served_scores(adapter, load_backbone(str(bases[family]), device="cpu"), texts)
    assert np.ptp(theirs, axis=0).max() > 0.01, "the texts must get different scores"
    assert np.abs(ours - theirs).max() <= FLOAT32_BOUND


@pytest.mark.slow
def test_a_lora_that_was_trained_with_peft_answers_here_as_there(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = train_with_peft(bases["roberta"], lora("roberta", lora_dropout=0.1), tmp_path / "out")
    output = tmp_path / "x.safetensors"
    argv = ["import-peft", str(folder), "--output", str(output), "--labels", *LABELS]
    assert main(argv) == 0
    theirs = peft_scores(bases["roberta"], folder)
    ours = served_scores(load_adapter(output), load_backbone(str(bases["roberta"]), device="cpu"))
    assert np.abs(ours - theirs).max() <= FLOAT32_BOUND
    assert theirs.argmax(axis=1).tolist() == TRAINED_CLASSES, "training must have worked"


def test_a_model_of_several_labels_has_scores_by_sigmoid(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_tuned(bases["bert"], lora("bert"), tmp_path / "tuned")
    assert import_peft(folder, LABELS, multi_label=True).adapter.spec.activation == "sigmoid"
    (folder / "config.json").write_text('{"problem_type": "multi_label_classification"}')
    assert import_peft(folder, LABELS).adapter.spec.activation == "sigmoid"


def test_changes_of_the_pooler_become_part_of_the_head(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_tuned(bases["bert"], lora("bert", target_modules="all-linear"), tmp_path / "all")
    adapter = import_peft(folder, LABELS).adapter
    assert isinstance(adapter.spec.tuning, LoraTuning)
    assert adapter.spec.tuning.sites == tuple(site for site in Site if site is not Site.ACTIVATED)
    ours = served_scores(adapter, load_backbone(str(bases["bert"]), device="cpu"))
    assert np.abs(ours - peft_scores(bases["bert"], folder)).max() <= FLOAT32_BOUND


def test_gpt2_may_read_the_end_token(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = save_tuned(bases["gpt2"], lora("gpt2"), tmp_path / "tuned")
    adapter = import_peft(folder, LABELS, end_token=True).adapter
    ours = served_scores(adapter, load_backbone(str(bases["gpt2"]), device="cpu"))
    theirs = peft_scores(bases["gpt2"], folder, [f"{text}<|endoftext|>" for text in TEXTS])
    assert np.abs(ours - theirs).max() <= FLOAT32_BOUND
