"""Keys: tokens, hashes, and which adapters a key is for."""

import statistics
import time

import pytest

from service.access.keys import ANYONE, Key, Secret, new_token, parse_token


def test_a_token_has_a_public_id_and_a_secret_that_only_its_hash_fits() -> None:
    token, key_id, secret = new_token()
    assert parse_token(token) == (key_id, token.split("_", 2)[2])
    other, other_id, _ = new_token()
    assert (other, other_id) != (token, key_id)
    assert secret.fits(token.split("_", 2)[2])
    assert not secret.fits(other.split("_", 2)[2])
    assert not secret.fits("")
    assert token.split("_", 2)[2] not in str(secret)


def test_equal_secrets_have_different_hashes() -> None:
    assert Secret.of("x") != Secret.of("x")
    assert Secret.of("x").fits("x")


def test_a_hash_is_read_as_it_is_written() -> None:
    secret = Secret.of("x")
    assert Secret.parse(str(secret)) == secret
    for text in ("", "x", f"{secret}0", str(secret).upper(), str(secret).replace("2b", "2s")):
        with pytest.raises(ValueError, match="hexadecimal"):
            Secret.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "idspam", "idspam_", "idspam_0123456789ab_", "IDSPAM_0123456789ab_" + "x" * 43]
    + ["idspam_0123456789ab_" + "x" * count for count in (42, 44)]
    + ["idspam_0123456789ab_" + "x" * 42 + "\n", "idspam_0123456789ab_" + "é" * 43],
)
def test_other_texts_are_no_tokens(text: str) -> None:
    assert parse_token(text) is None


def test_patterns_are_names_or_prefixes() -> None:
    key = Key(adapters=("team-*", "spam"))
    assert all(map(key.may_use, ("team-", "team-a", "team-a.b", "spam")))
    assert not any(map(key.may_use, ("team", "spam2", "spa", "", "team*", "xteam-a")))
    assert not key.sees_every_name
    assert ANYONE.may_use("anything")
    assert ANYONE.sees_every_name
    assert Key(adapters=("spam",)).may_use("spam")
    assert not Key(adapters=("spam",)).may_use("other")


def test_a_comparison_takes_equally_long_wherever_a_secret_differs() -> None:
    """A guard against an early exit, not a measurement of nanoseconds."""
    token = new_token()[0].split("_", 2)[2]
    secret = Secret.of(token)
    early = "0" + token[1:] if token[0] != "0" else "1" + token[1:]
    late = token[:-1] + ("0" if token[-1] != "0" else "1")

    def median(guess: str) -> float:
        times = []
        for _ in range(300):
            began = time.perf_counter()
            for _ in range(20):
                secret.fits(guess)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    ratio = median(early) / median(late)
    assert 0.5 < ratio < 2.0
