"""The guard: which key is refused why, who is told, and when a changed file holds."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.access import guard as guard_module
from service.access import keyring
from service.access.events import AccessEvent, AccessRefused, KeysChanged, RefusalReason
from service.access.guard import Client, Guard
from service.access.key_file import BadKeys, write
from service.access.keys import Key
from service.access.scopes import match
from service.access.throttle import FAILURES_PER_MINUTE
from service.errors import Forbidden, KeyExpired, KeyRevoked, TooManyFailures, Unauthorized
from service.settings import read_settings
from tests.support.key_files import bearer, record, write_keys

PAST, FUTURE = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))


class Counted:
    def __init__(self) -> None:
        self.reasons: list[RefusalReason] = []

    def access_refused(self, reason: RefusalReason) -> None:
        self.reasons.append(reason)


def guard_of(counter: Counted | None = None, **settings: str) -> Guard:
    environ = {f"IDSPAM_{key}": value for key, value in settings.items()}
    return Guard(read_settings(environ), counter or Counted())


def ask(guard: Guard, method: str, path: str, token: str | None, address: str = "192.0.2.1") -> Key:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return guard.authorise(match(method, path), headers, Client(address, method, path))


def test_each_refusal_is_counted_and_told_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    tokens = write_keys(
        path,
        old={"expires": PAST},
        gone={"revoked": PAST},
        reader={"scopes": ["adapters:read"], "adapters": ["team-*"], "expires": FUTURE},
    )
    counted, told = Counted(), list[AccessEvent]()
    guard = guard_of(counted, KEYS_FILE=str(path))
    guard.listen(told.append)
    wrong = tokens["old"][:-1] + ("A" if tokens["old"][-1] != "A" else "B")
    refusals: list[tuple[str | None, str, type[Exception], RefusalReason, str]] = [
        (None, "/v1/adapters", Unauthorized, "no_key", ""),
        ("x", "/v1/adapters", Unauthorized, "unknown_key", ""),
        (wrong, "/v1/adapters", Unauthorized, "unknown_key", ""),
        (tokens["old"], "/v1/adapters", KeyExpired, "expired_key", "old"),
        (tokens["gone"], "/v1/adapters", KeyRevoked, "revoked_key", "gone"),
        (tokens["reader"], "/metrics", Forbidden, "scope", "reader"),
        (tokens["reader"], "/v1/adapters/x", Forbidden, "adapter", "reader"),
    ]
    for token, asked, error, reason, who in refusals:
        with pytest.raises(Unauthorized if error is Unauthorized else error) as caught:
            ask(guard, "GET", asked, token)
        assert type(caught.value) is error
        assert counted.reasons.pop() == reason
        event = told.pop()
        assert isinstance(event, AccessRefused)
        assert (event.reason, event.who, event.path) == (reason, who, asked)
        assert abs(event.at - time.time()) < 5
        assert not told
    assert ask(guard, "GET", "/v1/adapters/team-a", tokens["reader"]).name == "reader"


def test_a_wrong_secret_learns_nothing_about_the_key_of_its_id(tmp_path: Path) -> None:
    """Expired, revoked, good or none: the answer is the same."""
    path = tmp_path / "keys.jsonl"
    tokens = write_keys(path, old={"expires": PAST}, gone={"revoked": PAST}, good={})
    guard = guard_of(KEYS_FILE=str(path))
    messages = set()
    for token in (*tokens.values(), "idspam_" + "0" * 12 + "_" + "x" * 43, "word"):
        with pytest.raises(Unauthorized) as caught:
            ask(guard, "GET", "/v1/adapters", token[:-1] + ("~" if token == "word" else "_"))
        messages.add((type(caught.value), str(caught.value)))
    assert len(messages) == 1


def test_guessing_is_throttled_by_address_but_a_token_still_works(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    tokens = write_keys(path, ci={})
    guard = guard_of(KEYS_FILE=str(path), API_KEYS="word")
    for number in range(FAILURES_PER_MINUTE):
        with pytest.raises(Unauthorized):
            ask(guard, "GET", "/v1/adapters", f"guess-{number}")
    for guess in ("guess", "word"):
        with pytest.raises(TooManyFailures) as caught:
            ask(guard, "GET", "/v1/adapters", guess)
        assert 0 < caught.value.retry_after <= 60 / FAILURES_PER_MINUTE
    assert ask(guard, "GET", "/v1/adapters", tokens["ci"]).name == "ci"
    assert ask(guard, "GET", "/v1/adapters", "word", "192.0.2.2").name == "env:api-1"
    with pytest.raises(Unauthorized):
        ask(guard, "GET", "/v1/adapters", None)


def test_a_flood_of_refusals_is_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    counted, told = Counted(), list[AccessEvent]()
    guard = guard_of(counted, ADMIN_KEYS="x")
    guard.listen(told.append)
    with caplog.at_level(logging.WARNING, "service.access.guard"):
        for number in range(500):
            with pytest.raises((Unauthorized, TooManyFailures)):
                ask(guard, "GET", "/v1/adapters", f"guess-{number}" if number % 2 else None)
    assert len(caplog.records) == 3
    assert len(counted.reasons) == len(told) == 500
    assert not any("guess" in line.getMessage() for line in caplog.records)


async def test_a_changed_file_holds_and_a_broken_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "RELOAD_SECONDS", 0.02)
    path = tmp_path / "keys.jsonl"
    old, old_token = record("old")
    new, new_token = record("new", scopes=["predict"])
    write(path, [old.line()])
    guard, told = guard_of(KEYS_FILE=str(path)), list[AccessEvent]()
    guard.listen(told.append)
    watching = asyncio.create_task(guard.watch())

    def works(token: str) -> bool:
        try:
            return bool(ask(guard, "POST", "/v1/predict", token).name)
        except (Unauthorized, TooManyFailures):
            return False

    async def until(condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("waited too long")

    assert works(old_token)
    write(path, [old.line(), new.line()])
    await until(lambda: works(new_token))
    assert works(old_token)

    for broken in ("{", new.line() + "\n" + new.line()):
        caplog.clear()
        write(path, [broken])
        await until(lambda: bool(caplog.records))
        await asyncio.sleep(0.1)
        (line,) = [item for item in caplog.records if item.levelno == logging.ERROR]
        assert f"the keys stay as they were: {path}: line " in line.getMessage()
        assert works(old_token)
        assert works(new_token)

    caplog.clear()
    path.unlink()
    await until(lambda: bool(caplog.records))
    await asyncio.sleep(0.1)
    (line,) = [item for item in caplog.records if item.levelno == logging.ERROR]
    assert "cannot be read: No such file" in line.getMessage()
    assert works(new_token)

    old.revoked = PAST
    write(path, [old.line()])
    await until(lambda: not works(old_token))
    assert not works(new_token)
    watching.cancel()
    source = str(path)
    assert [item for item in told if isinstance(item, KeysChanged)] == [
        KeysChanged(source, ("new",), (), (), (), at=told_at(told, 0)),
        KeysChanged(source, (), ("old",), ("new",), (), at=told_at(told, 1)),
    ]


def told_at(told: list[AccessEvent], index: int) -> float:
    return [item for item in told if isinstance(item, KeysChanged)][index].at


def test_keys_of_file_and_environment_hold_together_but_not_with_one_name(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys.jsonl"
    tokens = write_keys(path, ci={})
    line, token = record("other")
    both = guard_of(KEYS_FILE=str(path), KEYS=f"\n{line.line()}\n")
    assert ask(both, "GET", "/metrics", token).name == "other"
    assert ask(both, "GET", "/metrics", tokens["ci"]).name == "ci"
    line, _ = record("ci")
    with pytest.raises(BadKeys, match=r"line 1: the name 'ci' is also in IDSPAM_KEYS: line 1"):
        guard_of(KEYS_FILE=str(path), KEYS=line.line())


def test_a_file_without_keys_refuses_everybody_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.jsonl"
    write(path, [])
    guard = guard_of(KEYS_FILE=str(path))
    assert "no keys, so every request is refused" in caplog.text
    with pytest.raises(Unauthorized):
        ask(guard, "GET", "/v1/adapters", None)


def test_an_expired_key_is_one_line_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.jsonl"
    write_keys(path, old={"expires": PAST}, good={})
    guard_of(KEYS_FILE=str(path))
    assert [line.getMessage() for line in caplog.records] == [
        f"{path}: line 1: the key 'old' has expired"
    ]


def test_without_keys_anyone_may_do_everything() -> None:
    guard = guard_of()
    assert not guard.has_keys
    assert ask(guard, "DELETE", "/v1/adapters/a", None).name == ""


def test_either_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    token = write_keys(path, ci={})["ci"]
    guard, client = guard_of(KEYS_FILE=str(path)), Client("", "GET", "/metrics")
    route = match("GET", "/metrics")
    for headers in ({"x-api-key": token}, {"authorization": f"bearer {token}"}):
        assert guard.authorise(route, headers, client).name == "ci"
    assert bearer("x") == {"Authorization": "Bearer x"}


async def test_a_file_that_could_not_be_read_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without descriptors, for instance. A key that was revoked just then stayed valid."""
    path = tmp_path / "keys.jsonl"
    token = write_keys(path, ci={})["ci"]
    guard = guard_of(KEYS_FILE=str(path))
    assert ask(guard, "POST", "/v1/predict", token).name == "ci"
    write_keys(path, other={})
    with monkeypatch.context() as failing:

        def read(_: Path) -> None:
            raise BadKeys(f"{path}: cannot be read: Too many open files")

        failing.setattr(keyring, "read", read)
        for _ in range(3):
            assert guard._source.has_changed()
            await guard.reload()
    assert caplog.text.count("the keys stay as they were") == 1
    assert guard._source.has_changed()
    await guard.reload()
    assert not guard._source.has_changed()
    with pytest.raises(Unauthorized):
        ask(guard, "POST", "/v1/predict", token)
