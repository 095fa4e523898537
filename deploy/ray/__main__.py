"""`python -m deploy.ray [FILE]`: start Ray on this machine and the service on it, until Ctrl-C.

FILE is a config file of Ray Serve, by default deploy/ray/serve.yaml. `serve deploy` takes the same
file to a cluster.
"""

import signal
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path

import ray
from ray import serve

from deploy.ray.config import NAME, address_of, refuse_taken_address, replicas_at_start
from deploy.ray.running import (
    CONFIG,
    Interrupted,
    deploy,
    read_config,
    set_environment,
    wait_until_running,
)
from service.http.server import address_text
from service.settings import InvalidSettings
from service.start import StartFailed

# Bodies of requests are small, and nothing else is in it.
_OBJECT_STORE_BYTES = 100 * 2**20


def main(arguments: list[str]) -> int:
    """The exit status: 0 after Ctrl-C or SIGTERM, 2 when the service cannot start."""
    parser = ArgumentParser(prog="python -m deploy.ray", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=CONFIG, help="default: %(default)s")
    parser.add_argument("--port", type=int, help="in place of the file's http_options.port")
    parsed = parser.parse_args(arguments)
    ended = threading.Event()
    try:
        config = read_config(parsed.file)
        if parsed.port is not None:
            config.setdefault("http_options", {})["port"] = parsed.port
        host, port = address_of(config)
        refuse_taken_address(host, port)
        replicas = replicas_at_start(config)
        set_environment()
        try:
            ray.init(
                address="local",
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
            )
            # Ray has set handlers of its own, which end the process at once.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: ended.set())
            deploy(config)
            seconds = wait_until_running(replicas, exactly=False, ended=ended)
            sys.stdout.write(
                f"serving http://{address_text(host, port)} on Ray, ready after {seconds:.0f} s\n"
            )
            sys.stdout.flush()
            ended.wait()
            # Requests in flight are answered first: `shutdown` alone ends the proxies at once.
            serve.delete(NAME)
            serve.shutdown()
        except (Interrupted, KeyboardInterrupt):
            sys.stderr.write("ray: ended before the service was ready\n")
        finally:
            ray.shutdown()
    except (StartFailed, InvalidSettings) as error:
        sys.stderr.write(f"ray: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
