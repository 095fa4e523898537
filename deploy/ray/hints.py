"""Which adapters a request names, and how long it waits, as far as a glance shows.

A hint only chooses the replica: a wrong one costs an adapter load, never a wrong answer. So the
body is not parsed, and only its beginning is looked at.
"""

import re

# Bytes of a body that are looked at, and names that count.
LOOKED_AT = 16 * 1024
MOST = 8
_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
# `name@revision` prefers the replicas that have the name.
_IN_PATH = re.compile(rf"/(?:v2/models|adapters)/({_NAME})(?:/|$)")
_IN_BODY = re.compile(rf'"(?:adapter|model)"\s*:\s*"({_NAME})[@"]'.encode())
_IN_HINT = re.compile(_NAME)
_TIMEOUT_MS = re.compile(rb'"timeout_ms"\s*:\s*(\d{1,10})\s*[,}]')
# The Open Inference Protocol's, in microseconds.
_TIMEOUT_US = re.compile(rb'"timeout"\s*:\s*(\d{1,13})\s*[,}]')


def in_path(path: str) -> list[str]:
    """The adapter that a path asks to predict: `/v2/models/{name}/infer`, `/adapters/{name}`."""
    found = _IN_PATH.match(path)
    return [] if found is None else [found[1]]


def in_body(body: bytes) -> list[str]:
    """The first adapters that the beginning of a JSON body names, each once."""
    found = dict.fromkeys(match[1] for match in _IN_BODY.finditer(body[:LOOKED_AT]))
    return [name.decode() for name in list(found)[:MOST]]


def seconds_in(path: str, body: bytes) -> float | None:
    """The time limit that the beginning of a JSON body sets; None: that of the service."""
    pattern, unit = (_TIMEOUT_US, 1e6) if path.startswith("/v2/") else (_TIMEOUT_MS, 1e3)
    found = pattern.search(body[:LOOKED_AT])
    # Zero is the service's own, or refused.
    return int(found[1]) / unit or None if found else None


def pack(names: list[str]) -> str:
    """The hint as it travels, in a header."""
    return ",".join(names)


def unpack(hint: str) -> list[str]:
    """The names of a hint. Clients may send anything; what is no name is left out."""
    names = (item.strip() for item in hint[: MOST * 80].split(","))
    return [name for name in names if _IN_HINT.fullmatch(name)][:MOST]
