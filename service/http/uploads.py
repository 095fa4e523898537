"""Uploads: bodies and forms that are written to the store's disk while they arrive.

A file takes two megabytes of memory however large it is. It is removed when its block ends, unless
it was published.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from adapters.format.uploads import ReceivedFile, Upload
from service.errors import InvalidRequest, MalformedRequest, TooLarge
from service.http.bodies import limited_stream
from service.http.lifecycle import service_of
from service.settings import FORM_BYTES

# The pieces that are written. Each takes a trip to a thread, about as long as hashing 100 KB.
PIECE_BYTES = 2**20
# A form has one field beside the file. Some more are read, so that each of them can be named.
_MOST_FIELDS = 8


@asynccontextmanager
async def receive(request: Request, limit: int) -> AsyncIterator[ReceivedFile]:
    """The body as a file beside the store.

    Raises:
        StoreFailed: the disk fails, or has less space than announced.
        TooLarge, Overloaded, ...: as `service.http.bodies.read_body`.
    """
    async with _opened(request, limit) as upload:
        pieces = _Pieces(upload)
        async for chunk in limited_stream(request, limit):
            await pieces.add(chunk)
        await pieces.end()
        yield await asyncio.to_thread(upload.finish)


@asynccontextmanager
async def receive_form(request: Request, limit: int) -> AsyncIterator[tuple[str, ReceivedFile]]:
    """The name and the file of a form.

    Raises:
        MalformedRequest: a form that cannot be parsed, or is not in UTF-8.
        InvalidRequest: other fields than one `name` and one `file`.
        TooLarge, StoreFailed, ...: as `receive`.
    """
    _refuse_charset(request)
    async with _opened(request, limit) as upload:
        stream = limited_stream(request, limit + FORM_BYTES)
        parser = _FormParser(request.headers, stream, _FormFile(upload, limit))
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise MalformedRequest(f"the form cannot be read: {error.message}") from None
        fields = dict(form.multi_items())
        # Options are not read from two places.
        parameters = {each.alias for each in request.scope["route"].dependant.query_params}
        faults = [
            f"form.{field[:64]}: no such field"
            + (f": it is a parameter of the URL, `?{field}=...`" if field in parameters else "")
            for field in fields
            if field not in ("name", "file")
        ]
        faults += [f"form.{field}: given twice" for field in fields if len(form.getlist(field)) > 1]
        name, file = fields.get("name"), fields.get("file")
        if not isinstance(name, str):
            faults.append("form.name: missing, expected text")
        if not isinstance(file, UploadFile):
            faults.append("form.file: missing, expected a file")
        if faults or not isinstance(name, str):
            raise InvalidRequest(faults)
        yield name, await asyncio.to_thread(upload.finish)


def _refuse_charset(request: Request) -> None:
    """Starlette would decode the form by any codec of Python; some fail, others make surrogates.

    Raises:
        MalformedRequest: the form names another charset than UTF-8.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise MalformedRequest(f"the form's charset is {charset[:64]!r}, expected utf-8")


@asynccontextmanager
async def _opened(request: Request, limit: int) -> AsyncIterator[Upload]:
    announced = request.headers.get("content-length", "0")
    # Of a body over the limit, the limit is the reason.
    size = int(announced[:20]) if announced.isdecimal() else 0
    root = service_of(request).catalog.root
    upload = await asyncio.to_thread(Upload, root, announced=size if size <= limit else 0)
    try:
        yield upload
    finally:
        await asyncio.to_thread(upload.close)


class _Pieces:
    """Writes an upload piece by piece, in a thread, while the next piece arrives."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._piece = bytearray()
        self._writing: asyncio.Future[None] | None = None

    async def add(self, chunk: bytes) -> None:
        """Raises StoreFailed if the disk does, as `end`."""
        self._piece += chunk
        if len(self._piece) >= PIECE_BYTES:
            await self._write()

    async def end(self) -> None:
        """Return when everything is written."""
        await self._write()
        await self._written()

    async def _write(self) -> None:
        await self._written()
        piece, self._piece = self._piece, bytearray()
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._upload.write, piece))
        # If the request fails first, nobody asks for its error any more.
        self._writing.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing


class _FormFile:
    """An upload as Starlette's parser writes it: in a thread, since it has no `_rolled`."""

    def __init__(self, upload: Upload, limit: int) -> None:
        self._upload = upload
        self._limit = limit

    def write(self, data: bytes) -> None:
        if self._upload.size + len(data) > self._limit:
            raise TooLarge(f"the file is larger than {self._limit} bytes")
        self._upload.write(data)

    def seek(self, offset: int) -> None:
        """Called at the end of the file, for a reader; there is none."""

    def close(self) -> None:
        """The upload has an owner."""


class _FormParser(MultiPartParser):
    """Writes the one file of a form to a file of ours; a spooled one would be copied again."""

    def __init__(
        self, headers: Headers, stream: AsyncGenerator[bytes, None], file: _FormFile
    ) -> None:
        super().__init__(
            headers, stream, max_files=1, max_fields=_MOST_FIELDS, max_part_size=FORM_BYTES
        )
        self._file = file

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if (part := self._current_part.file) is not None:
            part.file.close()
            part.file = self._file  # type: ignore[assignment]  # a file as far as it is used
