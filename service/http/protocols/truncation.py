"""vLLM's `truncate_prompt_tokens`: a text is cut where reading ends, and nowhere else."""

from service.errors import InvalidRequest


def check_limit(limit: int | None, *, reads: int, reader: str) -> None:
    """
    Args:
        limit: null refuses a text that is too long; -1, or any number from `reads` up, cuts it.
        reads: tokens that the reader reads.
        reader: what reads them, for the message.

    Raises:
        InvalidRequest: fewer tokens than it reads.
    """
    if limit is not None and 0 <= limit < reads:
        raise InvalidRequest(
            [f"truncate_prompt_tokens: -1 or at least the {reads} that the {reader} reads"]
        )
