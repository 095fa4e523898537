"""The end of listening: clients that have connected already are accepted, later ones are refused.

A kernel completes connections before a process accepts them, and resets those that wait when the
socket is closed. Their clients have sent a request by then, and cannot know what became of it.
"""

import asyncio
import ssl
from collections.abc import Callable, Sequence
from socket import socket


async def stop_listening(
    listeners: Sequence[socket],
    close: Callable[[], None],
    protocol: Callable[[], asyncio.Protocol],
    tls: ssl.SSLContext | None,
) -> None:
    """Close the listeners, and serve the connections that waited in them.

    Args:
        listeners: which do not block.
        close: closes all of them.
        protocol: makes the protocol of a connection.
    """
    waiting = [connection for listener in listeners for connection in _accept_all(listener)]
    # At once: who connects in between is reset.
    close()
    loop = asyncio.get_running_loop()
    # A handshake may fail, and that is no one else's concern.
    await asyncio.gather(
        *(loop.connect_accepted_socket(protocol, connection, ssl=tls) for connection in waiting),
        return_exceptions=True,
    )


def _accept_all(listener: socket) -> list[socket]:
    accepted: list[socket] = []
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            # There are no more, or no more descriptors.
            return accepted
        connection.setblocking(False)
        accepted.append(connection)
