"""S3 as a process of its own: moto's server, on loopback. `python -m tests.support.s3_server PORT`.

moto checks the condition of a write and stores the object in two steps, and its server has a thread
for each request: without the lock below two writers can both create one object. Amazon's S3 does
both at once.
"""

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[2]
BUCKET = "adapters"
START_SECONDS = 30.0
# What clients need to find it, and nothing of the machine's own configuration.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


def environment(endpoint: str) -> dict[str, str]:
    """The variables with which a process uses this server."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL_S3": endpoint}


@contextmanager
def s3_server(*, port: int = 0) -> Iterator[str]:
    """A server with an empty bucket; yields its endpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.s3_server", str(port)],
        cwd=TREE,
        env=os.environ | CREDENTIALS,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        assert endpoint, "moto's server did not start"
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(request, timeout=START_SECONDS).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < until
                time.sleep(0.05)
        yield endpoint
    finally:
        process.terminate()
        process.communicate()


def one_write_at_a_time(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """A WSGI application whose writes do not overlap."""
    turn = threading.Lock()

    def locked(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("PUT", "POST", "DELETE"):
            return app(environ, start_response)
        with turn:
            return list(app(environ, start_response))

    return locked


def main() -> None:
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        protocol_version = "HTTP/1.1"

    app = one_write_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True, request_handler=Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
