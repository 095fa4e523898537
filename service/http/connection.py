"""Giving up work for a client that has closed its connection."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

# Most answers come sooner. Only a longer wait pays for a task that listens to the connection.
LISTEN_AFTER_SECONDS = 0.01


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work; cancel it if the client disconnects first. The body must have been read.

    Raises:
        ClientDisconnect: the client has gone.
    """
    task = asyncio.current_task()
    assert task is not None
    listeners: list[asyncio.Task[None]] = []
    disconnected = False

    async def listen() -> None:
        nonlocal disconnected
        while (await request.receive())["type"] != "http.disconnect":
            pass
        disconnected = True
        task.cancel()

    loop = asyncio.get_running_loop()
    timer = loop.call_later(
        LISTEN_AFTER_SECONDS, lambda: listeners.append(loop.create_task(listen()))
    )
    try:
        return await work
    except asyncio.CancelledError:
        if disconnected and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        for listener in listeners:
            listener.cancel()
