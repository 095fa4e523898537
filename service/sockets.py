"""Where the service listens. Knows nothing of what is served.

Apart from the server so that a taken port is told before anything slow is imported.
"""

import socket

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        OSError: no such address, or the port is taken.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def reserve(listener: socket.socket) -> socket.socket:
    """The address of a listener, which is closed, for sockets that share it; takes no connection.

    Raises:
        OSError: somebody else was faster.
    """
    address = listener.getsockname()
    listener.close()
    reserved = socket.socket(listener.family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if listener.family == socket.AF_INET6:
        # As `socket.create_server` has it.
        reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    reserved.bind(address)
    return reserved


def listen_beside(host: str, port: int) -> socket.socket:
    """A listening socket that shares a reserved address with others.

    The kernel spreads new connections over them evenly. Of several processes that accept from one
    socket, those that wake first take them: up to two and a half times their share.

    Raises:
        OSError: the address is not reserved, but taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True)
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
