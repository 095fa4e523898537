"""Whether the client is still there. Knows no route."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

# Most answers are there before; only what waits longer pays for a task that listens to the
# connection.
LISTEN_AFTER_SECONDS = 0.01


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the client goes away first: then it is cancelled. The body must have been
    read.

    Raises:
        ClientDisconnect: nobody waits for the result any more.
    """
    task = asyncio.current_task()
    assert task is not None
    listeners: list[asyncio.Task[None]] = []
    gone = False

    async def listen() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    loop = asyncio.get_running_loop()
    timer = loop.call_later(
        LISTEN_AFTER_SECONDS, lambda: listeners.append(loop.create_task(listen()))
    )
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        for listener in listeners:
            listener.cancel()
