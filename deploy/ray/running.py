"""Deploys a config file's content on a Ray cluster that this process is connected to, and looks at
what became of it.
"""

import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deploy.ray.arguments import checked
from deploy.ray.config import NAME, application_of
from service.start import StartFailed

TREE = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("serve.yaml")
# What every process of Ray needs, on every node.
ENVIRONMENT = {
    "PYTHONPATH": str(TREE),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray.edge:middleware",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Above the time that loading a backbone takes on a machine that does other work.
START_SECONDS = 300.0
_POLL_SECONDS = 0.2
# The last line of a traceback that ends in one of our errors.
_REASON = re.compile(r"(?:StartFailed|InvalidSettings|Unhealthy): (.+)")


class Interrupted(Exception):
    """Somebody ended the start."""


def read_config(file: Path) -> dict[str, Any]:
    """
    Raises:
        StartFailed: the file is no config of Ray Serve, or has bad settings; one line says why.
    """
    try:
        config: dict[str, Any] = yaml.safe_load(file.read_text())
        ServeDeploySchema.model_validate(config)
    except OSError as error:
        raise StartFailed(f"{file}: {error.strerror or error}") from None
    except (ValidationError, ValueError, yaml.YAMLError) as error:
        raise StartFailed(f"{file}: {' '.join(str(error).split())[:500]}") from None
    try:
        checked(application_of(config).get("args") or {})
    except StartFailed as error:
        raise StartFailed(f"{file}: {error}") from None
    return config


def deploy(config: Mapping[str, Any]) -> None:
    """Start or change what is deployed, and return before it runs."""
    schema = ServeDeploySchema.model_validate(config)
    serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
    # As `serve run` does with a file; there is no public function for it.
    _get_global_client().deploy_apps(schema, _blocking=False)


def wait_until_running(
    replicas: int = 1,
    *,
    exactly: bool = True,
    seconds: float = START_SECONDS,
    ended: threading.Event | None = None,
) -> float:
    """The seconds until so many replicas run.

    Args:
        exactly: and no other is running, starting or stopping. False: more may be there, as under
            load with autoscaling.
        ended: stops the waiting.

    Raises:
        StartFailed: the deployment failed, or takes too long; one line says why.
        Interrupted: by `ended`.
    """
    began = time.monotonic()
    ended = ended or threading.Event()
    while True:
        status, message, states = state()
        if status == "DEPLOY_FAILED":
            raise StartFailed(reason_in(message))
        if exactly:
            there = status == "RUNNING" and states == ({"RUNNING": replicas} if replicas else {})
        else:
            there = status != "NOT_STARTED" and states.get("RUNNING", 0) >= replicas
        if there:
            return time.monotonic() - began
        if time.monotonic() - began > seconds:
            raise StartFailed(f"{status} after {seconds:g} s, {states}: {reason_in(message)}")
        if ended.wait(_POLL_SECONDS):
            raise Interrupted


def state() -> tuple[str, str, dict[str, int]]:
    """The application's status, why it has that, and its replicas by their state."""
    application = serve.status().applications.get(NAME)
    if application is None:
        return "NOT_STARTED", "", {}
    deployment = application.deployments.get(NAME)
    messages = [application.message, "" if deployment is None else deployment.message]
    states = {} if deployment is None else deployment.replica_states
    counts = {str(getattr(key, "value", key)): count for key, count in states.items() if count}
    return str(application.status.value), "\n".join(messages), counts


def reason_in(message: str) -> str:
    """The line of a message of Serve that says what is wrong."""
    if found := _REASON.findall(message):
        return str(found[-1]).strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason is known"


def set_environment() -> None:
    """Before Ray is started from this process."""
    os.environ.update(ENVIRONMENT)
