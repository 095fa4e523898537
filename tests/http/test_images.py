"""Images of adapters in a running service: made, used after a restart, checked, removed."""

import random
from pathlib import Path
from typing import Any

import pytest

from adapters.format.files import serialize
from service.catalog import catalog
from service.engine.images import FOLDER
from tests.support.http_service import RunningService, serve, until
from tests.support.kinds import adapters_of_all_kinds
from tests.support.tiny_models import make_adapter, make_backbone

# A test that hangs fails.
pytestmark = pytest.mark.timeout(60)

TEXTS = ["free card now", "hello", "a good day to you and not a bad one"]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """By name: an adapter file of each kind."""
    adapters = adapters_of_all_kinds(make_backbone())
    return {f"n{index}": serialize(adapter) for index, adapter in enumerate(adapters.values())}


def images(root: Path) -> list[Path]:
    return sorted((root / FOLDER).glob("*/*.image"))


def results(live: RunningService, names: list[str]) -> list[Any]:
    return [live.predict(adapter=name, inputs=TEXTS)["results"] for name in names]


def events(live: RunningService, event: str) -> float:
    return live.metric("idspam_adapter_images_total", event=event)


@pytest.mark.slow
def test_flipped_bytes_of_images_change_no_answer(tmp_path: Path, files: dict[str, bytes]) -> None:
    names, chance = list(files), random.Random(1)
    with serve(tmp_path, IMAGES_MIB="0") as live:
        for name, content in files.items():
            assert live.client.put(f"/v1/adapters/{name}", content=content).is_success
        expected = results(live, names)
    assert not images(tmp_path)
    with serve(tmp_path) as live:
        # The start loads all of them.
        until(lambda: events(live, "made") == len(files))
        assert results(live, names) == expected
    made = {path: path.read_bytes() for path in images(tmp_path)}
    assert len(made) == len(files)
    with serve(tmp_path) as live:
        assert results(live, names) == expected
        assert events(live, "used") == len(files)
        assert events(live, "made") == events(live, "refused") == 0
    for path, content in made.items():
        altered = bytearray(content)
        altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
        path.write_bytes(altered[: chance.choice([len(altered), chance.randrange(len(altered))])])
    with serve(tmp_path) as live:
        assert results(live, names) == expected
        assert events(live, "refused") == len(files)
        until(lambda: events(live, "made") == len(files))
    assert {path: path.read_bytes() for path in images(tmp_path)} == made


@pytest.mark.slow
def test_images_go_with_their_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_RETIRED_SECONDS", 0.1)
    revisions = {}
    with serve(tmp_path) as live:
        for seed, name in enumerate(("a", "b", "c")):
            live.put(name, make_adapter(make_backbone(), seed=seed))
            revisions[name] = live.client.get(f"/v1/adapters/{name}").json()["revision"]
        until(lambda: len(images(tmp_path)) == 3)
        assert live.client.delete("/v1/adapters/a").is_success
        until(lambda: len(images(tmp_path)) == 2)
    # What was deleted while no service ran goes at the start.
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    (tmp_path / "b").rmdir()
    with serve(tmp_path) as live:
        until(lambda: [path.name[:64] for path in images(tmp_path)] == [revisions["c"]])
        assert live.predict(adapter="c", inputs="x")["results"]
