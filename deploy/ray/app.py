"""The application of serve.yaml: `import_path: deploy.ray.app:build`."""

from typing import Any

from ray import serve
from ray.serve import Application

from deploy.ray.arguments import checked
from deploy.ray.config import NAME
from deploy.ray.replica import Replica


def build(args: dict[str, Any]) -> Application:
    """
    Args:
        args: settings of the service, by their names in the environment.

    Raises:
        InvalidSettings: before any replica is started.
    """
    deployment = serve.deployment(
        name=NAME,
        # The engine has a queue of its own, which knows texts and deadlines; Serve's is not used.
        max_ongoing_requests=4096,
        max_queued_requests=-1,
        # A bad setting does not get better.
        max_constructor_retry_count=3,
    )(serve.ingress()(Replica))
    return deployment.bind(checked(args))
