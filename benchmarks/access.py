"""What checking a request's key costs: finding its route, its key, scope and quotas, nothing else.

A path of each kind, a key at random for each request, on one core.
"""

import logging
import random
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.arguments import at_least
from benchmarks.report import Report
from service.access.guard import Client, Guard, headers_for_guard
from service.access.key_file import KeyRecord, write
from service.access.keys import new_token
from service.access.scopes import match
from service.engine.observer import Observer
from service.errors import ServiceError
from service.settings import read_settings

SCOPES = ["predict", "adapters:read"]
# What clients send beside a key, as the server gives it to the app.
_HEADERS = [
    (b"host", b"localhost:8000"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
    (b"user-agent", b"python-httpx/0.28.1"),
    (b"content-length", b"52"),
    (b"content-type", b"application/json"),
]
# Figures, their requests' method and path, and what kind of key they have.
CASES = (
    ("predict, a good key", "POST", "/v1/predict", "good"),
    ("an adapter of the path, a good key for some", "GET", "/v1/adapters/team-7", "restricted"),
    ("predict, a key with both quotas", "POST", "/v1/predict", "limited"),
    ("predict, a wrong key", "POST", "/v1/predict", "wrong"),
    ("predict, a good key without the scope", "POST", "/v1/adapters", "good"),
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--keys", type=at_least(1), nargs="+", default=[1, 1000, 10_000])
    parser.add_argument("--requests", type=at_least(100), default=20_000, help="in each round")
    parser.add_argument("--rounds", type=at_least(1), default=5)


def run(options: Namespace) -> Report:
    """Microseconds a request: the median round, for each number of keys."""
    rows, figures = [], {}
    measured = {count: measure(count, options.requests, options.rounds) for count in options.keys}
    for case, *_ in CASES:
        times = {count: measured[count][case] for count in options.keys}
        figures[case] = {str(count): value for count, value in times.items()}
        rows.append([case, *(f"{value:.1f}" for value in times.values())])
    return Report(
        "checking a key, microseconds a request",
        ["request", *(f"{count:,} keys" for count in options.keys)],
        rows,
        figures,
        {"requests": options.requests, "rounds": options.rounds},
    )


def measure(keys: int, requests: int, rounds: int) -> dict[str, float]:
    """Microseconds a request of each case."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.jsonl"
        tokens = _write_keys(path, keys)
        guard = Guard(read_settings({"IDSPAM_KEYS_FILE": str(path)}), Observer())
    log = logging.getLogger("service.access.guard")
    level = log.level
    # Its few lines would stand between those of the table.
    log.setLevel(logging.ERROR)
    try:
        return _measured(guard, tokens, requests, rounds)
    finally:
        log.setLevel(level)


def _measured(
    guard: Guard, tokens: dict[str, list[str]], requests: int, rounds: int
) -> dict[str, float]:
    return {
        case: median(_round(guard, method, asked, tokens[kind], requests) for _ in range(rounds))
        for case, method, asked, kind in CASES
    }


def _round(guard: Guard, method: str, path: str, tokens: list[str], requests: int) -> float:
    chosen = random.Random(0).choices(tokens, k=requests)
    headers = [[*_HEADERS, (b"authorization", f"Bearer {token}".encode())] for token in chosen]
    client = Client("192.0.2.1", method, path)
    began = perf_counter()
    for sent in headers:
        try:
            guard.authorise(match(method, path), headers_for_guard(sent), client)
        except ServiceError:
            continue
    return (perf_counter() - began) / requests * 1e6


def _write_keys(path: Path, count: int) -> dict[str, list[str]]:
    """Write that many plain keys and a few others; returns tokens by kind."""
    kinds: dict[str, dict[str, object]] = {
        "good": {},
        "restricted": {"adapters": ["team-*", "other"]},
        "limited": {"requests_per_minute": 10**12, "tokens_per_minute": 10**12},
    }
    tokens: dict[str, list[str]] = {kind: [] for kind in kinds}
    lines = []
    for number in range(count):
        # One key each of the other kinds.
        for kind in kinds if number == 0 else ("good",):
            token, key_id, secret = new_token()
            name = f"{kind}-{number}"
            more: dict[str, object] = {"id": key_id, "name": name, "hash": str(secret)}
            fields = more | {"scopes": SCOPES} | kinds[kind]
            lines.append(KeyRecord(**fields).line())  # type: ignore[arg-type]  # as the kinds have them
            tokens[kind].append(token)
    write(path, lines)
    tokens["wrong"] = [token[:-1] + ("A" if token[-1] != "A" else "B") for token in tokens["good"]]
    return tokens
