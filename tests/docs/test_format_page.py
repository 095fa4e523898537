"""docs/adapter-format.md says what the code does: fields, tensors, and its example runs."""

import re
from pathlib import Path

import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import MAX_HEADER_BYTES, Adapter, save_adapter
from adapters.format.spec import AdapterSpec, BackboneIdentity, Calibration, Provenance
from tests.support.tiny_models import make_spec

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adapter-format.md").read_text()


def rows_of(heading: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_lists_every_field_of_the_spec_with_its_default() -> None:
    rows = rows_of("The spec")
    assert [names_in(row[0])[0] for row in rows] == list(AdapterSpec.model_fields)
    for name, field in AdapterSpec.model_fields.items():
        (default,) = [row[2].strip() for row in rows if names_in(row[0]) == [name]]
        if field.is_required():
            assert default == "required"
        elif not isinstance(field.default, Calibration | Provenance):
            assert default.strip("`") == str(field.default)


def test_the_page_states_the_ranges_that_are_checked() -> None:
    properties = AdapterSpec.model_json_schema()["properties"]
    for row in rows_of("The spec"):
        schema = properties[names_in(row[0])[0]]
        if "minimum" in schema:
            assert row[1].strip() == f"{schema['minimum']}..{schema['maximum']}"
    assert f"above {MAX_HEADER_BYTES // 2**20} MiB" in PAGE


@pytest.mark.parametrize("model", [BackboneIdentity, Calibration, Provenance])
def test_the_page_names_the_fields_inside_fields(model: type[BackboneIdentity]) -> None:
    meanings = {name for row in rows_of("The spec") for cell in row[1:] for name in names_in(cell)}
    assert model.model_fields.keys() <= meanings


def test_the_page_lists_every_tensor(backbone: Backbone) -> None:
    listed = {name for row in rows_of("The tensors") for name in names_in(row[0])}
    assert listed == make_spec(backbone, head="mlp").shapes().keys()


def test_the_example_reads_a_file(
    adapter: Adapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/adapter-format.md", "exec"), {})
    assert adapter.spec.backbone.name in capsys.readouterr().out
