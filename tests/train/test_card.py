"""The model card: what it says, and what the hub reads of it."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from adapters.backbone.loading import DEFAULT_BACKBONE
from adapters.format.spec import BackboneIdentity, Provenance
from tests.support.model_cards import FIT_REPORT, assessment_of, facts_of, fences, parsed
from train.metrics import Assessment, Metrics, assess
from train.report.card_file import card_path
from train.report.model_card import MOST_EPOCHS, CardFacts, model_card
from train.report.report import Baseline


def _with_assessment(facts: CardFacts, assessment: Assessment) -> CardFacts:
    return replace(facts, assessments={"test": assessment})


def _front_matter(card: str) -> dict[str, Any]:
    fields: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]  # not typed
    return fields


def test_the_card_lies_beside_the_adapter() -> None:
    assert card_path(Path("runs/x.safetensors")) == Path("runs/x.md")
    assert card_path(Path("runs/x.v2.safetensors")) == Path("runs/x.v2.md")


def test_the_hub_reads_the_front_matter() -> None:
    card = model_card(facts_of())
    assert _front_matter(card) == {
        "license": "cc-by-4.0",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "library_name": "id-spam",
        "tags": ["id-spam", "soft-prompt", "prompt-tuning", "text-classification"],
        "metrics": ["accuracy", "f1", "matthews_correlation"],
    }
    assert ModelCard(card).text.strip().startswith("# `my-task`")


@pytest.mark.parametrize(
    ("licence", "backbone", "expected"),
    [
        ("MIT", "roberta-large", {"license": "mit", "base_model": "roberta-large"}),
        (
            "free for all: its authors",
            "a/b@main",
            {"license": "other", "license_name": "free-for-all-its-authors", "base_model": "a/b"},
        ),
        ('"\n--- evil: 1', "/srv/models/mine", {"license": "other", "license_name": "evil-1"}),
        ("無料", "../x", {"license": "other", "license_name": "named-in-the-card"}),
        (None, "a/b/c", {}),
    ],
)
def test_the_front_matter_holds_only_values_that_the_hub_knows(
    licence: str | None, backbone: str, expected: dict[str, str]
) -> None:
    facts = facts_of()
    spec = facts.spec.model_copy(
        update={
            # A spec refuses a line break: the card must not depend on that.
            "provenance": Provenance.model_construct(data_licence=licence),
            "backbone": BackboneIdentity(name=backbone, fingerprint="1" * 64),
        }
    )
    data = _front_matter(model_card(replace(facts, spec=spec)))
    assert {key: data.get(key) for key in ("license", "license_name", "base_model")} == {
        "license": None,
        "license_name": None,
        "base_model": None,
    } | expected
    assert "language" not in data


def test_every_part_is_there_and_in_order() -> None:
    card = model_card(facts_of())
    tokens = parsed(card)
    titles = [
        tokens[index + 1].content
        for index, token in enumerate(tokens)
        if token.tag == "h2" and token.type == "heading_open"
    ]
    assert titles == ["Use", "Data", "Results", "Training", "Limits", "The file"]
    facts = facts_of()
    for part in (
        facts.revision,
        "123456",
        "two CPU cores",
        "torch 2.13.0",
        "| prompt.layer | 3 |",
        "| head.pooling | `answer` |",
        "cut to 128 tokens",
        "- The epoch was chosen on `validation`",
        "at temperature 1.5",
        "a class head alone 0.1000, always the most frequent label 0.1000.",
    ):
        assert part in card
    assessment = facts.assessments["test"]
    assert isinstance(assessment, Assessment)
    assert (
        f"**{assessment.accuracy.value:.4f}** (95 % interval {assessment.accuracy.low:.4f} to"
        in card
    )
    assert card.endswith("|\n")
    assert "\n\n\n" not in card


def test_the_commands_can_be_copied() -> None:
    facts = replace(facts_of(), file_name="My 'odd'; name.safetensors", paired=True)
    serve, ask, *_, fit = fences(model_card(facts))
    assert shlex.split(serve)[0] == f"IDSPAM_BACKBONE={DEFAULT_BACKBONE}"
    push, curl = ask.replace("\\\n", " ").strip().splitlines()
    words = shlex.split(push)
    assert words[words.index("--adapter") + 1] == facts.file_name
    assert words[words.index("--name") + 1] == "my-odd-name"
    assert json.loads(shlex.split(curl)[-1]) == {
        "adapter": "my-odd-name",
        "inputs": {"text": "the first text", "text_pair": "the second text"},
    }
    assert fit.strip() == facts.report.command


@pytest.mark.parametrize(
    "file_name", ["X.safetensors", "___.safetensors", "ü" * 90 + ".safetensors", "a" * 90]
)
def test_a_service_accepts_the_proposed_name(file_name: str) -> None:
    name = replace(facts_of(), file_name=file_name).name
    assert re.fullmatch("[a-z0-9][a-z0-9._-]{0,63}", name)


def test_the_chart_shows_where_scores_promise_too_much() -> None:
    logits = torch.tensor([[0.9, 0.1]] * 10).log()
    assessment = assess(logits, torch.tensor([0] * 5 + [1] * 5), ("ham", "spam"))
    (chart,) = (
        text
        for text in fences(model_card(_with_assessment(facts_of(), assessment)))
        if text.startswith("█")
    )
    (line,) = (line for line in chart.splitlines() if line.startswith("0."))
    assert line == f"0.87 to 0.93 {'█' * 20}{'·' * 16}│{'·' * 4} 0.50 of 10"


@pytest.mark.parametrize(("head", "warned"), [(0.1, False), (0.999, True), (None, False)])
def test_the_card_warns_if_a_control_is_as_good(head: float | None, warned: bool) -> None:
    facts = facts_of()
    control = None if head is None else Metrics(head, head, head)
    report = replace(facts.report, head_only=Baseline(None, control))
    card = model_card(replace(facts, report=report))
    assert ("**A control without a prompt" in card) == warned
    assert ("a class head alone" in card) == (head is not None)


def test_without_measured_rows_the_card_says_so() -> None:
    card = model_card(replace(facts_of(), assessments={}))
    assert "**Nothing was measured**" in card
    assert "## Results" not in card
    assert "## The file" in card


def test_no_mistake_in_the_test_rows_is_not_called_perfection() -> None:
    assessment = assessment_of(("ham", "spam"), right=1.1)
    card = model_card(_with_assessment(facts_of(), assessment))
    assert "up to 0.0500 of such texts may be answered wrongly" in card
    assert "may be answered wrongly" not in model_card(facts_of())


def test_many_labels_are_summarised() -> None:
    labels = [f"label-{index}" for index in range(151)]
    card = model_card(facts_of(labels, rows=600))
    assert "| `test` | 10 | `label-0` | 85 | 160 | `label-150` |" in card
    assert "### The 20 labels of lowest F1, on `test`" in card
    table = card.partition("### The 20 labels")[2].partition("###")[0]
    weakest = [float(f1) for f1 in re.findall(r"(\S+) \|$", table, re.MULTILINE)[2:]]
    assert len(weakest) == 20
    assert weakest == sorted(weakest)
    assert "The most frequent mistakes:" in card
    assert "Labels with fewer than 20 rows in `test`: 151 of 151." in card
    assert len(card.splitlines()) < 250


def test_long_runs_show_some_epochs_the_best_and_the_last() -> None:
    facts = facts_of()
    epochs = tuple(replace(FIT_REPORT.epochs[0], epoch=number) for number in range(1, 402))
    card = model_card(replace(facts, report=replace(facts.report, epochs=epochs, best_epoch=8)))
    shown = [int(row) for row in re.findall(r"^\| (\d+) \| 0\.2500 ", card, re.MULTILINE)]
    assert {1, 8, 401} <= set(shown)
    assert len(shown) <= MOST_EPOCHS + 2
    assert card.count("| kept |") == 1
