"""Compares an answer with what a page shows of it."""

from typing import Any

# Pages show scores of `auto`, tests compute float32: the bound of docs/exactness.md.
TOLERANCE = 0.02


def is_shown(answer: Any, shown: Any, *, varying: frozenset[str] = frozenset()) -> bool:
    """Whether an answer is what is shown, up to rounded scores and shortened revisions (`5f2c...`).

    varying: fields that differ from answer to answer; they must be there.
    """
    match shown:
        case float():
            return isinstance(answer, float) and abs(answer - shown) <= TOLERANCE
        case str() if shown.endswith("..."):
            return isinstance(answer, str) and answer.startswith(shown.removesuffix("..."))
        case list():
            return len(answer) == len(shown) and all(
                is_shown(item, other, varying=varying)
                for item, other in zip(answer, shown, strict=True)
            )
        case dict():
            return answer.keys() == shown.keys() and all(
                key in varying or is_shown(answer[key], shown[key], varying=varying)
                for key in shown
            )
        case _:
            return bool(answer == shown)
