"""An object store behind fsspec: S3, Google Cloud Storage, Azure Blob Storage.

Only stores are taken whose fsspec implementation sends the condition with the write itself. The
general `mode="create"` of fsspec looks first and writes then, which two writers can both pass.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from adapters.errors import StoreDenied, StoreFailed, StoreUnreachable
from adapters.shared.listed import Listed

T = TypeVar("T")

# s3fs repeats a request whose connection broke, this many times in all.
_TRIES = 2
# A transfer may take the timeout and one second for each of these.
_BYTES_PER_SECOND = 1 << 20
# Where a listing says when an object was written: in s3fs, gcsfs and adlfs.
_MODIFIED = ("LastModified", "mtime", "last_modified")
# How many objects are read at the same time.
_AT_ONCE = 32
# Nothing is asked of the store meanwhile.
_LOADING_SECONDS = 60.0

_DENIED_STATUSES = frozenset({401, 403})
_DENIED_CODES = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
)
# Of botocore, google-auth and azure-core: no credentials are set, or they cannot be renewed.
_DENIED_CLASSES = frozenset(
    {
        "ClientAuthenticationError",
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "RefreshError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    }
)


class Remote:
    """Every method may raise whatever the store's library raises; `failure` turns it into ours.

    Args:
        url: with its protocol.
        timeout: seconds for one call.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        protocol = url.split("://", 1)[0]
        options: dict[str, Any] = {}
        if protocol == "s3":
            options = {
                # With more, s3fs asks for an object's size before it reads it, and lists its folder
                # if it does not exist: three requests instead of one.
                "max_concurrency": 1,
                "config_kwargs": {
                    "connect_timeout": timeout / 3,
                    "read_timeout": timeout,
                    # s3fs repeats by itself.
                    "retries": {"total_max_attempts": 1},
                    "max_pool_connections": _AT_ONCE,
                },
            }
        # An instance of our own, which never lists from memory.
        self._fs: AsyncFileSystem = fsspec.filesystem(
            protocol, skip_instance_cache=True, use_listings_cache=False, **options
        )
        self._fs.retries = _TRIES
        self._root = self._fs._strip_protocol(url).rstrip("/")
        self._timeout = timeout
        self._load: Callable[[], Awaitable[object]] | None = None
        if protocol == "s3":
            # It makes its client from many files. On a slow processor that takes seconds, which are
            # not the store's; without this the first call would do it.
            self._load = self._fs.set_session

    def create(self, key: str, content: bytes) -> bool:
        try:
            self._write(key, content, mode="create")
        except Exception as error:
            if _exists(error):
                return False
            raise
        return True

    def put(self, key: str, content: bytes) -> None:
        self._write(key, content, mode="overwrite")

    def get(self, keys: Sequence[str], size: int) -> list[bytes | None]:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(key: str) -> bytes | None:
            async with turns:
                try:
                    content: bytes = await self._fs._cat_file(self._path(key))
                except FileNotFoundError as error:
                    _require_bucket(error)
                    return None
                return content

        async def every() -> list[bytes | None]:
            return await asyncio.gather(*map(one, keys))

        return self._run(every, size)

    def stat(self, key: str) -> Listed | None:
        async def looked() -> dict[str, Any] | None:
            self._fs.invalidate_cache()
            try:
                found: dict[str, Any] = await self._fs._info(self._path(key))
            except FileNotFoundError as error:
                _require_bucket(error)
                return None
            return found

        found = self._run(looked)
        return None if found is None else Listed(key, found["size"], _modified(found))

    def delete(self, key: str) -> None:
        async def deleted() -> None:
            try:
                await self._fs._rm_file(self._path(key))
            except FileNotFoundError as error:
                _require_bucket(error)

        self._run(deleted)

    def remove_unfinished(self, before: float) -> None:
        """Nothing: an object is there whole or not at all."""

    def _write(self, key: str, content: bytes, *, mode: str) -> None:
        async def written() -> None:
            await self._fs._pipe_file(self._path(key), content, mode=mode)

        self._run(written, len(content))

    def _run(self, call: Callable[[], Awaitable[T]], size: int = 0) -> T:
        """In fsspec's own thread; the call is cancelled when its time is over."""
        if self._load is not None:
            sync(self._fs.loop, self._load, timeout=_LOADING_SECONDS)
            self._load = None
        result: T = sync(self._fs.loop, call, timeout=self._timeout + size / _BYTES_PER_SECOND)
        return result

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def list(self, prefix: str) -> list[Listed]:
        folder = prefix.rstrip("/")

        async def listed() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            try:
                found: list[dict[str, Any]] = await self._fs._ls(self._path(folder), detail=True)
            except FileNotFoundError as error:
                _require_bucket(error)
                return []
            return found

        return [
            Listed(f"{folder}/{item['name'].rsplit('/', 1)[-1]}", item["size"], _modified(item))
            for item in self._run(listed)
            if item["type"] == "file"
        ]


def failure(url: str, doing: str, error: Exception) -> StoreFailed:
    """Our error for one of a store's library."""
    reason = _reason(error)
    if _is_denied(error):
        return StoreDenied(
            f"the adapter store {url} refuses the credentials, or has none, to {doing}: {reason}"
        )
    return StoreUnreachable(f"the adapter store {url} cannot {doing}: {reason}")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) or type(error).__name__ == "FSTimeoutError":
        return "no answer in time"
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it: fsspec translates, the status is in the original."""
    found: BaseException | None = error
    for _ in range(6):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status: of botocore, of gcsfs and aiohttp, of azure-core."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for attribute in ("status_code", "status", "code"):
        status = getattr(error, attribute, None)
        if isinstance(status, int):
            return status
    return None


def _code(error: BaseException) -> str:
    """S3's name of the error."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _exists(error: Exception) -> bool:
    """Whether the condition of a write failed. Some S3 servers leave out which one it was."""
    return any(isinstance(each, FileExistsError) or _status(each) == 412 for each in _causes(error))


def _is_denied(error: Exception) -> bool:
    return any(
        isinstance(each, PermissionError)
        or type(each).__name__ in _DENIED_CLASSES
        or _code(each) in _DENIED_CODES
        or _status(each) in _DENIED_STATUSES
        for each in _causes(error)
    )


def _require_bucket(error: Exception) -> None:
    """An object that is not there is an answer; a bucket that is not there is a failure.

    Raises:
        StoreUnreachable
    """
    if any(_code(each) in ("NoSuchBucket", "ContainerNotFound") for each in _causes(error)):
        raise StoreUnreachable("the bucket does not exist") from error


def _modified(item: dict[str, Any]) -> float:
    for key in _MODIFIED:
        if (when := item.get(key)) is not None:
            return float(when.timestamp())
    raise StoreUnreachable(f"a listing without times: {sorted(item)}")
