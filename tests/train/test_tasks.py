"""The table of tasks: what a row on the hub becomes, and whose labels mean the same."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from train.data.dataset import Dataset, Example
from train.data.hf_datasets import HubName
from train.data.task_data import SPLITS, load_named
from train.data.tasks import TASKS, as_labels_of
from train.errors import DataError
from train.metrics import Metric

ROOT = Path(__file__).resolve().parents[2]

# The label names of every task on the hub, in its order, and what one row of it becomes.
Row = Mapping[str, str | int]
ON_THE_HUB: dict[str, tuple[str, Row, Example]] = {
    "mnli": (
        "entailment neutral contradiction",
        {"premise": "p", "hypothesis": "h", "label": 1},
        Example("p", "h", "neutral"),
    ),
    "qnli": (
        "entailment not_entailment",
        {"question": "q?", "sentence": "s", "label": 0},
        Example("q?", "s", "entailment"),
    ),
    "sst2": ("negative positive", {"sentence": "s", "label": 1}, Example("s", None, "positive")),
    "mrpc": (
        "not_equivalent equivalent",
        {"sentence1": "a", "sentence2": "b", "label": 1},
        Example("a", "b", "equivalent"),
    ),
    "rte": (
        "entailment not_entailment",
        {"sentence1": "a", "sentence2": "b", "label": 1},
        Example("a", "b", "not_entailment"),
    ),
    "qqp": (
        "not_duplicate duplicate",
        {"question1": "a", "question2": "", "label": 0},
        Example("a", "", "not_duplicate"),
    ),
    "cola": (
        "unacceptable acceptable",
        {"sentence": "s", "label": 0},
        Example("s", None, "unacceptable"),
    ),
    "cb": (
        "entailment contradiction neutral",
        {"premise": "p", "hypothesis": "h", "label": 1},
        Example("p", "h", "contradiction"),
    ),
    "copa": (
        "choice1 choice2",
        {"premise": "P.", "choice1": "A.", "choice2": "{B}.", "question": "cause", "label": 1},
        Example("P. What was the cause of this?", "(1) A. (2) {B}.", "choice2"),
    ),
    "multirc": (
        "False True",
        {"paragraph": "P.", "question": "Q?", "answer": "A", "label": 1},
        Example("P.", "Q? A", "true"),
    ),
    "boolq": (
        "False True",
        {"question": "q", "passage": "T -- p", "label": 0},
        Example("q", "T -- p", "false"),
    ),
    "wic": (
        "False True",
        {"word": "bank", "sentence1": "a", "sentence2": "b", "start1": 3, "label": 1},
        Example("bank: a", "b", "true"),
    ),
    "imdb": ("neg pos", {"text": "t", "label": 0}, Example("t", None, "negative")),
    "sms_spam": ("ham spam", {"sms": "t", "label": 1}, Example("t", None, "spam")),
    "banking77": (
        "age_limit atm_support",
        {"text": "t", "label": 1},
        Example("t", None, "atm_support"),
    ),
    "clinc150": ("oos alarm", {"text": "t", "intent": 0}, Example("t", None, "oos")),
    "ag_news": (
        "World Sports Business Sci/Tech",
        {"text": "t", "label": 3},
        Example("t", None, "Sci/Tech"),
    ),
}


def _write_hub(folder: Path, name: str, *, change: Row | None = None) -> None:
    """A folder that the hub's library loads as the repository of a task. Two rows a split: the one
    of the table, then the same with another label."""
    names, row, _ = ON_THE_HUB[name]
    task, count = TASKS[name], len(names.split())
    assert task.hub is not None
    config = HubName.parse(task.hub, split="train").config or "default"
    label = int(row[task.label])
    rows = [dict(row), {**row, task.label: (label + 1) % count, **(change or {})}]
    folder.mkdir()
    features: list[dict[str, object]] = [
        {"name": column, "dtype": "int32" if isinstance(value, int) else "string"}
        for column, value in row.items()
        if column != task.label
    ]
    classes = {str(index): known for index, known in enumerate(names.split())}
    features.append({"name": task.label, "dtype": {"class_label": {"names": classes}}})
    files = []
    for split in task.splits.values():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append({"split": split, "path": f"{split}.jsonl"})
    # JSON is YAML.
    card = {
        "configs": [{"config_name": config, "data_files": files}],
        "dataset_info": {"config_name": config, "features": features},
    }
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def _hub_of(folder: Path, name: str) -> str:
    config = str(TASKS[name].hub).partition(":")[2]
    return f"{folder}:{config}" if config else str(folder)


def test_the_table_is_whole() -> None:
    assert set(ON_THE_HUB) == {name for name, task in TASKS.items() if task.hub}
    for name, task in TASKS.items():
        assert name == task.name
        assert len(set(task.labels)) == len(task.labels)
        assert "train" in task.rows
        assert set(task.splits) <= set(task.rows) <= set(SPLITS)
        assert bool(task.splits) == bool(task.hub)
        assert set(task.words) <= set(task.columns)
        if (words := task.words.get(task.label)) is not None:
            assert tuple(words.values()) == task.labels


def test_splits_without_labels_are_not_read() -> None:
    of_glue = {name: task for name, task in TASKS.items() if "glue" in str(task.hub)}
    assert len(of_glue) == 12
    for name, task in of_glue.items():
        validation = "validation_matched" if name == "mnli" else "validation"
        assert task.splits == {"train": "train", "validation": validation}
        assert str(task.hub).endswith(f":{name}")


def test_metrics_are_the_papers() -> None:
    of = {name: task.metric for name, task in TASKS.items() if task.metric != Metric.ACCURACY}
    assert of == {
        "mrpc": Metric.ACCURACY_F1,
        "qqp": Metric.ACCURACY_F1,
        "cb": Metric.ACCURACY_F1,
        "cola": Metric.MATTHEWS,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_row_on_the_hub_becomes_what_local_files_hold(folder: Path, name: str) -> None:
    _write_hub(folder / "mini", name)
    task = TASKS[name]
    data = load_named(replace(task, hub=_hub_of(folder / "mini", name)), data_root=None)
    names, _, expected = ON_THE_HUB[name]
    datasets = {split: getattr(data, split) for split in SPLITS}
    assert {split for split, dataset in datasets.items() if dataset} == set(task.splits)
    for dataset in datasets.values():
        if dataset is not None:
            first, second = dataset.examples
            assert first == expected
            assert replace(second, label=first.label) == first
            assert second.label != first.label
    if task.labels:
        words = task.words.get(task.label, {})
        assert task.labels == tuple(words.get(known, known) for known in names.split())
    assert (data.name, data.metric) == (name, task.metric)
    assert len(data.notes) == len(task.splits)
    assert data.notes[0] == f"train 2 of {task.rows['train']:,}"


def test_rows_of_the_hub_have_a_hash_that_knows_their_words(folder: Path) -> None:
    _write_hub(folder / "one", "copa")
    _write_hub(folder / "other", "copa", change={"choice1": "else"})
    one, other = (
        load_named(replace(TASKS["copa"], hub=f"{folder / name}:copa"), data_root=None).train
        for name in ("one", "other")
    )
    assert len(one.sha256) == 64
    assert one.sha256 != other.sha256
    assert one.source == f"hub:{folder / 'one'}:copa@train"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("copa", {"question": "why"}, ":2: 'question' is 'why', not one of 'cause', 'effect'"),
        ("boolq", {"label": -1}, ":2: label -1 has no name: this split is not labelled"),
    ],
)
def test_a_row_of_the_hub_that_cannot_be_read_is_refused_at_its_number(
    folder: Path, name: str, change: Row, expected: str
) -> None:
    _write_hub(folder / "mini", name, change=change)
    with pytest.raises(DataError) as caught:
        load_named(replace(TASKS[name], hub=f"{folder / 'mini'}:{name}"), data_root=None)
    assert str(caught.value).endswith(f"@train{expected}")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("spam ", "spam"), "label 'spam ' looks like 'spam' at "),
        (("cafe\u0301", "caf\u00e9"), "label 'cafe\\u0301' looks like 'caf\\xe9' at "),
        (("1.0", "1"), "label '1.0' is the same number as '1' at "),
        (("ham", "\u202emaps"), "'label': the label '\\u202emaps' has the control character"),
        (("ham", "x" * 300), "'label' has 300 characters, at most 256 are possible"),
    ],
)
def test_labels_of_a_task_on_the_hub_are_checked_like_those_of_files(
    folder: Path, names: tuple[str, str], expected: str
) -> None:
    _write_hub(folder / "mini", "sst2")
    card = (folder / "mini" / "README.md").read_text()
    for old, new in zip(("negative", "positive"), names, strict=True):
        assert json.dumps(old) in card
        card = card.replace(json.dumps(old), json.dumps(new))
    (folder / "mini" / "README.md").write_text(card)
    task = replace(TASKS["sst2"], labels=(), hub=f"{folder / 'mini'}:sst2")
    with pytest.raises(DataError) as caught:
        load_named(task, data_root=None)
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_row_of_the_hub_without_a_value_is_refused(folder: Path) -> None:
    _write_hub(folder / "mini", "sst2")
    with (folder / "mini" / "train.jsonl").open("a") as file:
        file.write('{"sentence": null, "label": 0}\n')
    with pytest.raises(DataError, match=r":3: 'sentence' is missing \(null\), expected a string"):
        load_named(replace(TASKS["sst2"], hub=f"{folder / 'mini'}:sst2"), data_root=None)


def test_a_hub_data_set_of_other_columns_is_refused_naming_data_root(folder: Path) -> None:
    _write_hub(folder / "mini", "sst2")
    with pytest.raises(DataError) as caught:
        load_named(
            replace(TASKS["cola"], text="{words}", hub=f"{folder / 'mini'}:sst2"), data_root=None
        )
    message = str(caught.value)
    assert "no column 'words'; there are: 'sentence', 'label'" in message
    assert message.endswith("with --data-root, the folder cola in it is read")


@pytest.mark.slow
def test_an_unreachable_hub_is_refused_in_one_line_naming_data_root(tmp_path: Path) -> None:
    script = (
        "from train.data.task_data import load_task\n"
        "from train.errors import DataError\n"
        "try: load_task('sst2', data_root=None)\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("hub:nyu-mll/glue:sst2@train: neither a file nor a hub data set")
    assert line.endswith("with --data-root, the folder sst2 in it is read")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("proxy", "expected"),
    [
        ("ftp://127.0.0.1:1", "ALL_PROXY: 'ftp://127.0.0.1:1' is no address of a proxy"),
        ("http://127.0.0.1:1", "through the proxy http://127.0.0.1:1 of ALL_PROXY"),
    ],
)
def test_a_proxy_in_the_way_to_the_hub_is_named_in_one_line(
    tmp_path: Path, proxy: str, expected: str
) -> None:
    environ = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    command = [sys.executable, "-m", "train", "fit", "--train", "hub:nyu-mll/glue:sst2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "x.safetensors")],
        cwd=ROOT,
        env=environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "ALL_PROXY": proxy},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def _rows(*labels: str) -> Dataset:
    rows = tuple(Example(f"t{index}", None, label) for index, label in enumerate(labels))
    return Dataset("rows", "0" * 64, rows)


def test_labels_that_mean_the_same_are_renamed() -> None:
    rows = _rows("duplicate", "not_duplicate", "duplicate")
    renamed = as_labels_of(rows, source=TASKS["qqp"], target=TASKS["mrpc"])
    assert [row.label for row in renamed.examples] == ["equivalent", "not_equivalent", "equivalent"]
    assert [row.text for row in renamed.examples] == ["t0", "t1", "t2"]
    assert renamed.source == rows.source
    assert as_labels_of(renamed, source=TASKS["mrpc"], target=TASKS["qqp"]) == rows
    for source, target in (("imdb", "sst2"), ("amazon_reviews", "imdb"), ("sst2", "sst2")):
        rows = _rows("negative", "positive")
        assert as_labels_of(rows, source=TASKS[source], target=TASKS[target]) == rows
    rows = _rows("entailment", "not_entailment")
    assert as_labels_of(rows, source=TASKS["rte"], target=TASKS["qnli"]) == rows


@pytest.mark.parametrize(
    ("source", "target"), [("boolq", "wic"), ("mnli", "rte"), ("sst2", "mrpc"), ("rte", "mrpc")]
)
def test_labels_that_mean_something_else_are_refused(source: str, target: str) -> None:
    rows = _rows(*TASKS[source].labels)
    with pytest.raises(DataError) as caught:
        as_labels_of(rows, source=TASKS[source], target=TASKS[target])
    assert str(caught.value) == (
        f"rows: the labels of {source} do not mean what those of {target} mean"
    )


def test_rows_that_are_not_of_the_source_are_refused() -> None:
    with pytest.raises(DataError, match="labels that qqp does not have: 'equivalent'"):
        as_labels_of(_rows("equivalent"), source=TASKS["qqp"], target=TASKS["mrpc"])
