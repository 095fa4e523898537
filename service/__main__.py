"""`python -m service serve`; every other command line goes to `service.commands.main`."""

import errno
import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cli.imports import importing
from cli.shell import escape_unencodable
from service.auto_workers import workers_of
from service.devices import devices_of
from service.settings import (
    TREE_ZOO,
    InvalidSettings,
    Settings,
    contradictions,
    read_settings,
)
from service.start import StartFailed, log_service_links

# Not its own name, which is `__main__`.
logger = logging.getLogger("service")


def main(arguments: list[str]) -> int:
    """The exit status: 0 after a drain, 2 when the service cannot start, or the command's."""
    if arguments == ["serve"]:
        return serve()
    with importing():
        from service.commands.main import main as run

    return run(arguments)


def serve() -> int:
    """Serve until a signal ends it; returns the exit status."""
    escape_unencodable()
    try:
        _serve(read_settings(os.environ))
    except (InvalidSettings, StartFailed) as error:
        sys.stderr.write(f"service: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(settings: Settings) -> None:
    try:
        device = ",".join(devices_of(settings.device))
    except ValueError as error:
        raise InvalidSettings([f"IDSPAM_DEVICE: {settings.device}: {error}"]) from None
    workers = workers_of(settings.workers, device)
    settings = replace(settings, device=device, workers=workers)
    if faults := list(contradictions(settings)):
        raise InvalidSettings(faults)
    # Imported only to serve: commands also run where no web framework is installed.
    with importing():
        from adapters.errors import StoreInUse
        from adapters.format.ownership import StoreLock
        from service.access.exposure import Exposed, refuse_exposed
        from service.access.key_file import BadKeys
        from service.access.keyring import keyring_of
        from service.access.tls import BadCertificate, certificate_of
        from service.http.app import route_paths
        from service.http.proxies import taken_by_a_route
        from service.http.server import address_text, listen, url_of
        from service.observability.logs import configure_logging
        from service.records.audit import check_audit_log
        from service.records.decisions import check_decision_log

    # Checked at once, not seconds later when torch has been imported.
    if settings.root_path and taken_by_a_route(settings.root_path, route_paths()):
        raise StartFailed(f"IDSPAM_ROOT_PATH: paths of the service begin like {settings.root_path}")
    try:
        keyring_of(settings)
        if (certificate := certificate_of(settings)) is not None:
            certificate.check()
    except (BadKeys, BadCertificate) as error:
        raise StartFailed(str(error)) from None
    with _start_errors(f"IDSPAM_ADAPTER_DIR: cannot use {settings.adapter_dir}"):
        _require_writable(settings.adapter_dir)
        lock = StoreLock(settings.adapter_dir, "service")
        try:
            # Held until this process ends.
            lock.acquire()
        except StoreInUse as error:
            raise StartFailed(f"IDSPAM_ADAPTER_DIR: {error}") from None
    zoo = settings.zoo_dir
    # An image may be without the tree's own.
    if zoo is not None and zoo != TREE_ZOO and not zoo.is_dir():
        raise StartFailed(f"IDSPAM_ZOO_DIR: {zoo}: no such folder; `off` is none")
    for setting, check in (("AUDIT_LOG", check_audit_log), ("DECISION_LOG", check_decision_log)):
        with _start_errors(f"IDSPAM_{setting}: cannot be written"):
            check(settings)
    with _start_errors(f"cannot listen on {address_text(settings.host, settings.port)}"):
        listener = listen(settings.host, settings.port)
    try:
        # Nothing is accepted yet.
        refuse_exposed(settings)
    except Exposed as error:
        raise StartFailed(str(error)) from None

    # Importing torch and loading the backbone take seconds.
    process = "supervisor" if settings.workers else None
    configure_logging(settings.log_level, settings.log_format, process=process)
    logger.info(
        "starting url=%s workers=%d backbone=%s device=%s",
        url_of(listener, settings.scheme),
        settings.workers,
        settings.backbone,
        settings.device,
    )
    if settings.workers:
        with importing():
            from service.ipc.supervisor import supervise

        supervise(settings, listener)
    else:
        _serve_in_this_process(settings, listener)


def _serve_in_this_process(settings: Settings, listener: socket.socket) -> None:
    with importing():
        from prometheus_client import CollectorRegistry, ProcessCollector

        from service.access.exposure import log_access
        from service.http.app import create_app, route_paths
        from service.http.errors import error_types
        from service.http.server import Server, survive_late_signals, url_of
        from service.local import local_backend
        from service.observability.metrics import Metrics

    log_service_links(os.environ)
    log_access(settings)
    # That of the process has no names to be found by.
    registry = CollectorRegistry(support_collectors_without_names=True)
    ProcessCollector(registry=registry)
    metrics = Metrics(registry, routes=route_paths(), error_types=error_types())
    app = create_app(settings, local_backend(settings, metrics), metrics)
    url = url_of(listener, settings.scheme)
    server = Server(app, app.state.service, url=url, announce=_print_line, end_within=_end_within)
    survive_late_signals(_end_within)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise StartFailed(server.failure)


def _end_within(seconds: float) -> None:
    """End the process after so many seconds, if it has not ended by then. Python waits for every
    thread, also for one that reads from a disk which does not answer."""

    def end() -> None:
        logger.warning("a thread does not end: the process ends without it")
        # As if it had: it was told to end.
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def _start_errors(message: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "; IDSPAM_PORT names another port" if error.errno == errno.EADDRINUSE else ""
        raise StartFailed(f"{message}: {error.strerror or error}{hint}") from None


def _require_writable(folder: Path) -> None:
    """
    Raises:
        OSError: the folder cannot be created, or no file in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
