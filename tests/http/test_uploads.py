"""A body is written to the disk piece by piece, each while the next one arrives."""

import asyncio
import threading

import pytest

from adapters.errors import StoreFailed
from adapters.format.uploads import Upload
from service.http.uploads import PIECE_BYTES, _Pieces


class SlowUpload(Upload):
    """Keeps what is written in memory, once it may."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.pieces: list[bytes] = []
        self.begun = 0
        self.may_write = threading.Event()
        self._fails_at = fails_at

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.begun += 1
        assert self.may_write.wait(10)
        if self.begun == self._fails_at:
            raise StoreFailed("the disk is gone")
        self.pieces.append(bytes(data))


def chunks(count: int) -> list[bytes]:
    """Half a piece each."""
    return [bytes([number]) * (PIECE_BYTES // 2) for number in range(count)]


async def test_pieces_are_written_in_their_order_while_the_next_one_arrives() -> None:
    upload = SlowUpload()
    pieces = _Pieces(upload)
    # Neither the first piece nor half of the second waits for the disk.
    for chunk in chunks(3):
        await pieces.add(chunk)
    # Then one piece is written, and one waits.
    fourth = asyncio.create_task(pieces.add(chunks(4)[3]))
    await asyncio.sleep(0.05)
    assert upload.begun == 1
    assert not fourth.done()
    upload.may_write.set()
    await fourth
    await pieces.add(b"end")
    await pieces.end()
    assert b"".join(upload.pieces) == b"".join(chunks(4)) + b"end"
    assert [len(piece) for piece in upload.pieces] == [PIECE_BYTES, PIECE_BYTES, 3]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
async def test_an_error_of_the_disk_is_raised_with_a_later_piece_or_at_the_end(
    fails_at: int,
) -> None:
    upload = SlowUpload(fails_at)
    upload.may_write.set()
    pieces = _Pieces(upload)

    async def send() -> None:
        for chunk in chunks(4):
            await pieces.add(chunk)
        await pieces.end()

    with pytest.raises(StoreFailed, match="the disk is gone"):
        await send()
    assert len(upload.pieces) == fails_at - 1


async def test_an_error_that_nobody_waits_for_is_not_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    upload = SlowUpload(fails_at=1)
    pieces = _Pieces(upload)
    for chunk in chunks(2):
        await pieces.add(chunk)
    # The request ends here; asyncio would report the error when the future is collected.
    writing = pieces._writing
    upload.may_write.set()
    assert writing is not None
    await asyncio.wait([writing])
    del pieces, writing
    await asyncio.sleep(0)
    assert not caplog.records
