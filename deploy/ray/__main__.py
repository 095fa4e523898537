"""`python -m deploy.ray [FILE]`: start Ray on this machine and the service on it, until Ctrl-C.

FILE is a config file of Ray Serve, by default deploy/ray/serve.yaml. `serve deploy` takes the same
file to a cluster.
"""

import signal
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import ray
from ray import serve

from deploy.ray.app import NAME
from deploy.ray.running import CONFIG, deploy, read_config, set_environment, wait_until_running
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
        options = config.setdefault("http_options", {})
        if parsed.port is not None:
            options["port"] = parsed.port
        set_environment()
        ray.init(
            address="local",
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
        )
        # Ray has set handlers of its own, which end the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        try:
            deploy(config)
            seconds = wait_until_running(_replicas(config))
            url = f"http://{options.get('host', '127.0.0.1')}:{options.get('port', 8000)}"
            sys.stdout.write(f"serving {url} on Ray, ready after {seconds:.0f} s\n")
            sys.stdout.flush()
            ended.wait()
            # Requests in flight are answered first: `shutdown` alone ends the proxies at once.
            serve.delete(NAME)
            serve.shutdown()
        finally:
            ray.shutdown()
    except (StartFailed, InvalidSettings) as error:
        sys.stderr.write(f"ray: {error}\n")
        return 2
    return 0


def _replicas(config: dict[str, Any]) -> int:
    """How many replicas there are at the start."""
    deployments = config["applications"][0].get("deployments") or [{}]
    scaling = deployments[0].get("autoscaling_config") or {}
    return int(scaling.get("min_replicas") or deployments[0].get("num_replicas") or 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
