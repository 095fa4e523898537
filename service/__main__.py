"""`python -m service` serves; `python -m service settings` and `metrics` print their tables."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from service.settings import InvalidSettings, Settings, read_settings, settings_table
from service.sockets import listen, url_of

# All answers are out when uvicorn is told to exit; this is for connections that do not close.
CLOSING_SECONDS = 2
# Longer than clients keep idle connections in their pools, so that it is they who close them.
KEEP_ALIVE_SECONDS = 75


class StartFailed(Exception):
    """The service cannot run like this; the message is the one line that says why."""


def main(arguments: list[str]) -> int:
    """The exit status: 0 after a drain, 2 when the service cannot start."""
    try:
        match arguments:
            case []:
                _serve(read_settings(os.environ))
            case ["settings"]:
                sys.stdout.write(settings_table())
            case ["metrics"]:
                from service.metrics import metrics_table

                sys.stdout.write(metrics_table())
            case _:
                raise StartFailed("usage: python -m service [settings | metrics]")
    except (InvalidSettings, StartFailed) as error:
        sys.stderr.write(f"service: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(settings: Settings) -> None:
    # Told at once, not seconds later when torch is imported.
    with _told(f"IDSPAM_ADAPTER_DIR: cannot use {settings.adapter_dir}"):
        _require_writable(settings.adapter_dir)
    with _told(f"cannot listen on {settings.host}:{settings.port}"):
        listener = listen(settings.host, settings.port)

    import uvicorn

    from adapters.errors import AdapterError
    from adapters.loading import load_backbone
    from adapters.store import AdapterStore
    from service.app import create_app
    from service.logs import configure_logging
    from service.server import Server, ignore_repeated_signals

    configure_logging(settings.log_level)
    load = partial(load_backbone, settings.backbone, device=settings.device, dtype=settings.dtype)
    try:
        app = create_app(settings, AdapterStore(settings.adapter_dir), load=load)
    except (AdapterError, OSError) as error:
        raise StartFailed(str(error)) from None
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    server = Server(config, app.state.service, url=url_of(listener))
    ignore_repeated_signals()
    server.run(sockets=[listener])
    if server.failure is not None:
        raise StartFailed(server.failure)


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartFailed(f"{what}: {error.strerror or error}") from None


def _require_writable(folder: Path) -> None:
    """
    Raises:
        OSError: no file can be made in the folder, or the folder itself cannot be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
