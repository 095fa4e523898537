"""What decides the result of a run, kept with its state: a state is resumed by the same run alone.

An identity is a mapping of JSON values. Two of them are compared name by name, so that a refusal
says what differs.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from train.config.settings import entries

Identity: TypeAlias = Mapping[str, Any]

_SHOWN = 8
_OF_THE_METHOD = ("design", "recipe", "defaults")
# Names whose values say nothing to a person, and what they are.
_OPAQUE = {
    "backbone": "the backbone's weights",
    "sizes": "the backbone's sizes",
    "labels": "the labels",
    "starts_from": "the adapter of --init-from",
    "space": "what --search may choose",
    "candidates": "the methods that are compared",
}


def encode_identity(identity: Identity) -> str:
    """Equal for equal identities."""
    return json.dumps(identity, sort_keys=True)


def decode_identity(text: str) -> Identity:
    """Empty if the text is none, as in the states of earlier versions."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def differences(saved: Identity, now: Identity) -> list[str]:
    """`--epochs was 12 and is 5`, `other rows in train`; only of names that both have."""
    now = decode_identity(encode_identity(now))
    if saved.get("method") != now.get("method"):
        # With another method most of its settings differ as well: the method says it all.
        now = {name: now[name] for name in now if name not in _OF_THE_METHOD}
    found = list(_differences(saved, now))
    more = [f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more


def refusal(path: object, kind: str, found: list[str]) -> str:
    """Why a state is not resumed. kind: run or search."""
    what = f" ({'; '.join(found)})" if found else ""
    return (
        f"{path}: belongs to a {kind} with other data, settings or backbone{what}: give the flags "
        "of then, or begin anew with --overwrite in place of --resume"
    )


def _differences(saved: Identity, now: Identity) -> Iterator[str]:
    flags = {entry.name: entry.flag for entry in entries()}
    for name in [name for name in now if name in saved and saved[name] != now[name]]:
        then, value = saved[name], now[name]
        if name == "data":
            splits = sorted({*then, *value})
            yield from (
                f"other rows in {split}" for split in splits if then.get(split) != value.get(split)
            )
        elif name in _OPAQUE:
            yield f"not the same: {_OPAQUE[name]}"
        elif isinstance(then, dict) and isinstance(value, dict):
            yield from _differences(then, value)
        else:
            yield f"{flags.get(name, name)} was {_shown(then)} and is {_shown(value)}"


def _shown(value: Any) -> str:
    if value is None:
        return "open"
    return f"{value:g}" if isinstance(value, float) else str(value)
