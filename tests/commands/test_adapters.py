"""`python -m service adapters ...` as it is typed, asking a real service."""

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.format.files import save_adapter
from tests.support.http_service import RunningService, serve, until
from tests.support.service_process import TREE
from tests.support.tiny_models import make_adapter, make_backbone
from tests.support.typed_commands import command, environment, refused, terminal, typed


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        running.put("a", make_adapter(make_backbone()))
        running.put("b", make_adapter(make_backbone(), seed=1, labels=("x", "y", "z")))
        yield running


@pytest.mark.slow
def test_adapters_are_uploaded_listed_shown_rolled_back_downloaded_and_deleted(
    live: RunningService, tmp_path: Path
) -> None:
    for seed, name in enumerate(("mine", "other")):
        save_adapter(
            tmp_path / f"{name}.safetensors", make_adapter(make_backbone(), seed=40 + seed)
        )

    def adapters(*words: str) -> str:
        done = typed("adapters", *words, "--url", live.url, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    one = adapters("upload", "mine.safetensors").split()
    assert (one[0], one[2]) == ("mine", "created")
    two = json.loads(adapters("upload", "other.safetensors", "--name", "mine", "--json"))
    assert two["changed"]
    table = adapters("list").splitlines()
    assert table[0].split()[:3] == ["name", "state", "revision"]
    assert [line.split()[:3] for line in table if line.startswith("mine")] == [
        ["mine", "ready", two["revision"][:12]]
    ]
    listed = json.loads(adapters("list", "--json"))
    assert [item["name"] for item in listed] == ["a", "b", "mine"]
    assert one[1][:12] in adapters("show", "mine")
    assert json.loads(adapters("show", "mine", "--json"))["revisions"] == [two["revision"], one[1]]
    assert adapters("rollback", "mine").split()[1:] == [one[1], "replaced"]
    (tmp_path / "mine.safetensors").unlink()
    assert adapters("download", "mine").split()[:2] == ["mine.safetensors", one[1]]
    again = ("adapters", "download", "mine", "--url", live.url)
    assert "exists" in refused(*again, folder=tmp_path)
    assert not typed(*again, "--output", "mine.safetensors", folder=tmp_path).returncode
    new = refused(
        *("adapters", "upload", "mine.safetensors", "--new", "--url", live.url), folder=tmp_path
    )
    assert "412 revision_conflict" in new
    assert live.client.post("/v2/repository/models/mine/unload").status_code == 200
    assert "unloaded" in adapters("list")
    assert adapters("delete", "mine") == "mine deleted\n"
    assert "no adapter is named 'mine'" in refused("adapters", "show", "mine", "--url", live.url)


@pytest.mark.slow
def test_a_card_goes_with_the_file_and_is_shown(live: RunningService, tmp_path: Path) -> None:
    for seed, name in enumerate(("carded", "later")):
        path = tmp_path / f"{name}.safetensors"
        save_adapter(path, make_adapter(make_backbone(), seed=60 + seed))
    card = "# Carded\n\x1b[31mred\x1b[0m\n\ta\u00a0tab\n"
    (tmp_path / "carded.md").write_text(card)
    shown = f"its model card carded.md ({len(card)} characters)"
    where = ("--url", live.url)

    def adapters(*words: str) -> tuple[str, str]:
        done = typed("adapters", *words, *where, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    _, said = adapters("upload", "carded.safetensors", "--dry-run")
    assert said == f"{shown} would be kept with it\n"
    out, said = adapters("upload", "carded.safetensors", "--json")
    first = json.loads(out)["revision"]
    assert said == f"with {shown}\n"
    facts = dict(line.split(maxsplit=1) for line in adapters("show", "carded")[0].splitlines())
    assert facts["card"] == f"{len(card)} characters; --card prints it"
    assert adapters("show", "carded", "--card")[0] == card
    with terminal(40, 80) as (end, drawn):
        words = command("adapters", "show", "carded", "--card", *where)
        subprocess.run(words, cwd=TREE, env=environment(), stdout=end, check=True)
    # A terminal obeys nothing in it.
    assert drawn.decode().replace("\r\n", "\n").split("\n")[1] == "?[31mred?[0m"
    assert json.loads(adapters("show", "carded", "--card", "--json")[0])["revision"] == first
    _, said = adapters("upload", "later.safetensors", "--name", "carded")
    assert said == ""
    assert "none with this revision" in adapters("show", "carded")[0]
    refusal = refused("adapters", "show", "carded", "--card", *where)
    assert "404 card_not_found" in refusal
    old = ("show", "carded", "--card", "--revision", first[:12])
    assert adapters(*old)[0].startswith("# Carded")
    assert "belongs to --card" in refused("adapters", "show", "carded", "--revision", "0", *where)
    table = adapters("list", "--search", "card", "--state", "ready")[0].splitlines()
    assert [line.split()[0] for line in table] == ["name", "carded"]
    adapters("delete", "carded")


@pytest.mark.slow
def test_a_key_comes_from_a_flag_or_the_environment(tmp_path: Path) -> None:
    with serve(tmp_path, API_KEYS="user", ADMIN_KEYS="admin") as closed:
        words = ("adapters", "list", "--url", closed.url)
        assert "401 unauthorized" in (line := refused(*words))
        assert "give --api-key" in line
        assert typed(*words, "--api-key", "user").returncode == 0
        assert typed(*words, ID_SPAM_API_KEY="user").returncode == 0
        forbidden = ("adapters", "delete", "a", "--url", closed.url, "--api-key", "user")
        assert "needs a key with the scope adapters:write" in refused(*forbidden)


@pytest.mark.slow
@pytest.mark.parametrize("action", [("show", "c"), ("show", "c", "--json"), ("list",)])
def test_labels_that_the_terminal_cannot_encode_are_escaped(
    live: RunningService, action: tuple[str, ...]
) -> None:
    live.put("c", make_adapter(make_backbone(), labels=("caf\u00e9", "\u20ac \U0001f642")))
    done = typed("adapters", *action, "--url", live.url, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    if "--json" in action:
        labels = json.loads(done.stdout)["labels"]
        assert labels == ["caf\u00e9", "\u20ac \U0001f642"]
    elif "show" in action:
        assert r"caf\u00e9" in done.stdout
        assert r"\u20ac \ud83d\ude42" in done.stdout


@pytest.mark.slow
def test_a_second_revision_is_staged_tried_shown_and_promoted(
    live: RunningService, tmp_path: Path
) -> None:
    for seed, name in enumerate(("one", "two")):
        save_adapter(
            tmp_path / f"{name}.safetensors", make_adapter(make_backbone(), seed=50 + seed)
        )

    def adapters(*words: str) -> str:
        done = typed("adapters", *words, "--url", live.url, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    first = adapters("upload", "one.safetensors", "--name", "t").split()[1]
    _, second, outcome = adapters("upload", "two.safetensors", "--name", "t", "--stage").split()
    assert outcome == "staged"
    tried = ("--revision", second[:9], "--percent", "50", "--max-disagreement", "off")
    shown = adapters("traffic", "t", *tried, "--min-texts", "500")
    assert f"{second[:12]} on 50 % of texts, canary" in shown
    live.predict(adapter="t", inputs=[f"free {number}" for number in range(40)])
    until(lambda: bool(json.loads(adapters("traffic", "t", "--json"))["figures"]["compared"]))
    shown = adapters("traffic", "t")
    assert "disagree" in shown
    assert "0 failed" in shown
    detail = json.loads(adapters("traffic", "t", "--json"))
    assert (detail["rule"]["max_disagreement"], detail["rule"]["min_texts"]) == (None, 500)
    assert "stopped" in adapters("traffic", "t", "--end")
    adapters("traffic", "t", *tried, "--shadow")
    assert adapters("traffic", "t", "--promote").split()[1:] == [second, "replaced"]
    again = ("adapters", "traffic", "t", "--url", live.url)
    assert "404 traffic_not_found" in refused(*again, "--promote", folder=tmp_path)
    assert "belong together" in refused(*again, "--percent", "5", folder=tmp_path)
    assert "409 revision_current" in refused(
        *again, "--revision", second, "--percent", "5", folder=tmp_path
    )
    assert first != second


@pytest.mark.slow
def test_diff_compares_files_names_and_revisions(live: RunningService, tmp_path: Path) -> None:
    first, second = make_adapter(make_backbone()), make_adapter(make_backbone(), seed=5)
    other = make_adapter(make_backbone(), labels=("x", "y", "z"), prompt_length=5)
    revision = live.put("compared", first)
    live.put("compared", second)
    path = tmp_path / "other.safetensors"
    save_adapter(path, other)

    def diff(*words: str) -> list[str]:
        done = typed("adapters", "diff", *words, "--url", live.url)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    head, _, weights = diff(f"compared@{revision[:8]}", "compared")
    assert head == f"compared@{revision[:8]}: revision {revision}"
    assert weights.startswith("weights: ")
    assert diff("compared", "compared")[-1] == "the same file"
    lines = diff("compared", str(path))
    assert "labels added: x, y, z" in lines
    assert any(line.startswith("prompt.") and "3" in line and "5" in line for line in lines)
    (content,) = map(json.loads, diff("compared", str(path), "--json"))
    assert content["difference"]["labels"]["added"] == ["x", "y", "z"]
    assert content["before"]["adapter"] == "compared"
    # Two files need no service.
    done = typed("adapters", "diff", str(path), str(path), "--url", "http://127.0.0.1:1")
    assert done.stdout.endswith("the same file\n")


@pytest.mark.slow
def test_diff_refuses_what_is_no_adapter(live: RunningService, tmp_path: Path) -> None:
    for name, content in (
        ("short.safetensors", b"\x01"),
        ("huge.safetensors", b"\xff" * 64),
        ("text", b"hello\n" * 20),
        ("foreign.safetensors", struct.pack("<Q", 2) + b"{}"),
        ("list.safetensors", struct.pack("<Q", 2) + b"[]"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        line = refused("adapters", "diff", str(path), str(path))
        assert f"{path}: this is no adapter file" in line
    path = tmp_path / "none.safetensors"
    assert f"{path}: cannot be read: No such file" in refused("adapters", "diff", str(path), "a")
    assert "404 adapter_not_found" in refused("adapters", "diff", "no", "no", "--url", live.url)


@pytest.mark.slow
def test_a_dry_run_says_what_would_change_and_stores_nothing(
    live: RunningService, tmp_path: Path
) -> None:
    revision = live.put("tried", make_adapter(make_backbone()))
    path = tmp_path / "tried.safetensors"
    save_adapter(path, make_adapter(make_backbone(), seed=9))
    words = ("adapters", "upload", str(path), "--dry-run", "--url", live.url)
    done = typed(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"takes the place of {revision}" in done.stdout
    assert "not checked: whether the disk has room" in done.stdout
    assert done.stdout.endswith("would be accepted\n")
    assert "the name is new" in typed(*words, "--name", "new").stdout
    assert json.loads(typed(*words, "--json").stdout)["accepted"] is True
    other = tmp_path / "other.safetensors"
    save_adapter(other, make_adapter(make_backbone(seed=3)))
    refusal = refused(*words[:2], str(other), *words[3:], "--name", "tried")
    assert "adapter_incompatible" in refusal
    shown = live.client.get("/v1/adapters/tried").json()
    assert (shown["revision"], shown["revisions"]) == (revision, [revision])
