"""Tags of `If-Match` and `If-None-Match`."""

from starlette.requests import Request


def tags_of(request: Request, header: str, *, weak: bool = False) -> frozenset[str]:
    """The tags of such a header without quotes, or `*`.

    Args:
        weak: a weak tag counts as its strong one, as RFC 9110 compares for `If-None-Match`; for
            `If-Match` it never matches.
    """
    tags = (tag.strip() for value in request.headers.getlist(header) for tag in value.split(","))
    if weak:
        tags = (tag.removeprefix("W/") for tag in tags)
    return frozenset(tag.strip('"') if tag.strip('"') else "none" for tag in tags)


def is_known(request: Request, tag: str) -> bool:
    """Whether the caller has what this tag, without quotes, is of: the answer is then 304."""
    return not tags_of(request, "if-none-match", weak=True).isdisjoint({tag, "*"})
