"""docs/adapter-format.md says what the code does: fields, ranges, tensors."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from adapters.format.files import MAX_HEADER_BYTES
from adapters.format.profile import MOST_EDGES, Profile
from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    BackboneIdentity,
    Calibration,
    Decision,
    EmbeddingTable,
    FirstTokenPrompt,
    Head,
    HeadKind,
    HiddenActivation,
    LoraTuning,
    Pooling,
    Provenance,
    RoutedPrompt,
    Site,
    StaticPrompt,
    VectorTuning,
)

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adapter-format.md").read_text()


def rows_of(heading: str, *, before: str = "## ") -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split(f"\n{before}")[0]
    return [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_lists_every_field_of_the_spec_with_its_default() -> None:
    rows = rows_of("The spec", before="### ")
    assert [names_in(row[0])[0] for row in rows] == list(AdapterSpec.model_fields)
    for name, field in AdapterSpec.model_fields.items():
        (default,) = [row[2].strip() for row in rows if names_in(row[0]) == [name]]
        if field.is_required():
            assert default == "required"
        elif not isinstance(field.default, Calibration | Provenance | Head):
            assert default.strip("`") == str(field.default)


def test_the_page_states_the_ranges_that_are_checked() -> None:
    properties = AdapterSpec.model_json_schema()["properties"]
    for row in rows_of("The spec", before="### "):
        schema = properties[names_in(row[0])[0]]
        if "minimum" in schema:
            assert row[1].strip() == f"{schema['minimum']}..{schema['maximum']}"
    assert f"above {MAX_HEADER_BYTES // 2**20} MiB" in PAGE


@pytest.mark.parametrize("model", [BackboneIdentity, Calibration, Provenance])
def test_the_page_names_the_fields_inside_fields(model: type[BackboneIdentity]) -> None:
    meanings = {name for row in rows_of("The spec") for cell in row[1:] for name in names_in(cell)}
    assert model.model_fields.keys() <= meanings


@pytest.mark.parametrize(
    ("heading", "kinds"),
    [
        ("Prompts", [AttentionPrompt, FirstTokenPrompt, RoutedPrompt, StaticPrompt]),
        ("Tunings", [VectorTuning, LoraTuning]),
    ],
)
def test_the_page_lists_every_kind_with_its_fields(
    heading: str, kinds: Sequence[type[BaseModel]]
) -> None:
    section = PAGE.split(f"### {heading}\n")[1].split("\n#")[0]
    shared = set(names_in(section.split("\n|")[0]))
    rows = {names_in(row[0])[0]: set(names_in(row[1])) for row in rows_of(heading, before="#")}
    assert list(rows) == [kind.model_fields["kind"].default for kind in kinds]
    for kind in kinds:
        named = rows[kind.model_fields["kind"].default] | shared
        assert kind.model_fields.keys() - {"kind"} <= named


def test_the_page_lists_the_fields_of_a_head_with_their_values() -> None:
    rows = {names_in(row[0])[0]: names_in(row[1]) for row in rows_of("Heads", before="#")}
    assert rows == {
        "kind": list(HeadKind), "pooling": list(Pooling), "hidden": list(HiddenActivation)
    }  # fmt: skip


def test_the_page_lists_the_fields_of_a_decision() -> None:
    rows = rows_of("Decisions", before="#")
    assert [names_in(row[0])[0] for row in rows] == list(Decision.model_fields)
    (most,) = [part.max_length for part in Decision.model_fields["coverage"].metadata]
    assert f"at most {most} of" in rows[-1][1]


def test_the_page_lists_the_fields_of_a_profile() -> None:
    rows = rows_of("Profiles", before="## ")
    assert [names_in(row[0])[0] for row in rows] == list(Profile.model_fields)
    assert f"at most {MOST_EDGES} rising numbers" in PAGE


def test_the_page_lists_every_tensor() -> None:
    listed = {name for row in rows_of("The tensors") for name in names_in(row[0])}
    sites = tuple(site for site in Site if site is not Site.ACTIVATED)
    parts = (
        AttentionPrompt(length=2, layer=1, bottleneck=3, attention_size=4),
        FirstTokenPrompt(length=2, layer=1, bottleneck=3),
        RoutedPrompt(length=2, prompts=3),
        StaticPrompt(length=2, table=EmbeddingTable(positions=5, rank=2, width=8)),
        VectorTuning(layers=(0, 2), intermediate_size=16, activated=True),
        LoraTuning(layers=(0, 2), intermediate_size=16, rank=2, scaling=1.0, sites=sites),
    )
    names = {name for part in parts for name in part.shapes(8)}
    assert listed == names | Head(kind=HeadKind.MLP).shapes(8, 2).keys()
