"""Files of keys for tests, and the tokens that go with them."""

import json
from pathlib import Path
from typing import Any

from service.access.key_file import KeyRecord, write
from service.access.keys import new_token
from service.access.scopes import SCOPES


def record(name: str, **fields: Any) -> tuple[KeyRecord, str]:
    """A record with a new secret, and its token; it has all scopes unless it names some."""
    token, key_id, secret = new_token()
    values: dict[str, Any] = {"scopes": list(SCOPES), **fields}
    return KeyRecord(id=key_id, name=name, hash=str(secret), **values), token


def write_keys(path: Path, **keys: dict[str, Any]) -> dict[str, str]:
    """Write a file with a key for each keyword; returns their tokens by name.

    Underscores in names become hyphens.
    """
    made = {name.replace("_", "-"): record(name.replace("_", "-"), **keys[name]) for name in keys}
    write(path, [line.line() for line, _ in made.values()])
    return {name: token for name, (_, token) in made.items()}


def bearer(token: str) -> dict[str, str]:
    """The header that carries a token."""
    return {"Authorization": f"Bearer {token}"}


def revoke(path: Path, name: str) -> None:
    """Revoke the key of this name, as `keys revoke` does; services see it within two seconds."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for stored in records:
        if stored["name"] == name:
            stored["revoked"] = "2026-01-01T00:00:00Z"
    write(path, [json.dumps(stored) for stored in records])
