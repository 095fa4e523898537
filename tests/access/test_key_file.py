"""The file of keys: what a line may say, and the one sentence for each that may not."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.access.key_file import BadKeys, parse, parse_time, read, write
from tests.support.key_files import record, write_keys


def line(**fields: Any) -> str:
    """A line with these fields in place of good ones; None leaves a field out."""
    good = msgspec.to_builtins(record("ci", scopes=["predict"])[0])
    changed = {key: value for key, value in (good | fields).items() if value is not None}
    return msgspec.json.encode(changed).decode()


def test_a_line_becomes_a_key() -> None:
    text = line(
        scopes=["predict", "adapters:read"],
        adapters=["team-*"],
        expires="2031-01-31T00:00:00+02:00",
        weight=2,
        requests_per_minute=600,
        tokens_per_minute=100_000,
    )
    ((key, _, place),) = parse(f"# keys\n\n{text}\n", "keys.jsonl")
    assert place == "keys.jsonl: line 3"
    assert key.name == "ci"
    assert key.scopes == {"predict", "adapters:read"}
    assert key.adapters == ("team-*",)
    assert key.expires == parse_time("2031-01-30T22:00:00").timestamp()
    assert (key.weight, key.requests_per_minute, key.tokens_per_minute) == (2.0, 600, 100_000)
    assert key.revoked is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": None}, "missing required field `name`"),
        ({"nmae": "x"}, "unknown field `nmae`"),
        ({"name": "two words"}, "name 'two words': expected 1 to 64 of"),
        ({"name": "env:api-1"}, "name 'env:api-1'"),
        ({"name": "x" * 65}, "name 'xxx"),
        ({"id": "xyz"}, "id 'xyz': expected 12 hexadecimal digits"),
        ({"scopes": ["write"]}, "scope 'write': expected some of predict, adapters:read, "),
        ({"scopes": []}, "scopes: none"),
        ({"scopes": "predict"}, "Expected `array`, got `str`"),
        ({"adapters": []}, "adapters: none; leave the field out"),
        ({"adapters": ["*"]}, "adapters: '*': expected a name, or a prefix"),
        ({"adapters": ["a*b"]}, "adapters: 'a*b'"),
        ({"adapters": ["a"], "scopes": ["metrics"]}, "metrics name every adapter"),
        ({"expires": "2031-01-31T00:00:00"}, "expires: has no time zone"),
        ({"expires": "soon"}, "Invalid RFC3339 encoded datetime"),
        ({"weight": 0}, "weight 0: expected more than 0"),
        ({"weight": 1e9}, "weight 1e+09"),
        ({"weight": "2"}, "Expected `float`"),
        ({"requests_per_minute": 0}, "requests_per_minute 0: expected a whole number"),
        ({"tokens_per_minute": -1}, "tokens_per_minute -1"),
        ({"tokens_per_minute": 1.5}, "Expected `int | null`, got `float`"),
        ({"hash": "sha256:00"}, "hash: expected blake2b:SALT:DIGEST"),
    ],
)
def test_a_bad_line_is_one_sentence_that_names_it(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadKeys) as caught:
        parse(line() + "\n" + line(**{"id": "0" * 12, "name": "other"} | fields), "keys.jsonl")
    message = str(caught.value)
    assert message.startswith("keys.jsonl: line 2: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '"x"', "{}{}", "x", "[" * 100_000, '{"id": 1}', "\x00"]
)
def test_a_line_that_is_no_object_is_named(text: str) -> None:
    with pytest.raises(BadKeys, match="keys: line 1: "):
        parse(text, "keys")


def test_two_keys_cannot_share_a_name_or_an_id() -> None:
    with pytest.raises(BadKeys, match="keys: line 3: the name 'ci' is also on line 1"):
        parse(f"{line()}\n\n{line()}", "keys")
    same = line(id="0" * 12)
    with pytest.raises(BadKeys, match="keys: line 2: the id 000000000000 is also on line 1"):
        parse(f"{same}\n{same}", "keys")


def test_the_name_of_a_revoked_key_is_free_again() -> None:
    keys = parse(f"{line(revoked='2026-01-01T00:00:00Z')}\n{line()}", "keys")
    assert [key.revoked is None for key, _, _ in keys] == [False, True]


def test_a_file_that_others_can_read_or_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    write_keys(path, ci={})
    assert len(read(path)) == 1
    for mode in (0o640, 0o604, 0o620, 0o602, 0o610, 0o601):
        path.chmod(mode)
        with pytest.raises(BadKeys, match=f"mode {mode:04o}.: chmod 600 {path}"):
            read(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadKeys, match=r"none\.jsonl: cannot be read: No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(BadKeys, match="directory"):
        read(tmp_path)
    path = tmp_path / "keys"
    path.write_bytes(b"# \n\xff")
    path.chmod(0o600)
    with pytest.raises(BadKeys, match="line 2: not UTF-8"):
        read(path)


def test_a_file_is_replaced_in_one_step_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    before = os.umask(0)
    try:
        write(path, ["# one"])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    inode = path.stat().st_ino
    write(path, ["# one", "# two"])
    assert path.read_text() == "# one\n# two\n"
    assert path.stat().st_ino != inode
    assert [item.name for item in tmp_path.iterdir()] == ["keys.jsonl"]


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    path, link = tmp_path / "keys.jsonl", tmp_path / "link"
    write(path, [])
    link.symlink_to(path)
    write(link, ["# x"])
    assert link.is_symlink()
    assert path.read_text() == "# x\n"
