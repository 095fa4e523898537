"""The Kubernetes manifests as `kubectl apply -k` sends them: kustomize's own output, parsed."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

# One object of the API: `apiVersion`, `kind`, `metadata`, ...
Manifest: TypeAlias = Mapping[str, Any]

ROOT = Path(__file__).resolve().parent / "kubernetes"
# What can be applied, relative to ROOT.
OVERLAYS = (
    "base",
    "overlays/gpu",
    "overlays/s3",
    "overlays/folder",
    "overlays/gpu-s3",
    "kserve",
)


class NoKustomize(Exception):
    """Neither kubectl nor kustomize is installed."""


def kustomize() -> Sequence[str]:
    """The command that renders a folder.

    Raises:
        NoKustomize: there is none.
    """
    for command in (("kubectl", "kustomize"), ("kustomize", "build")):
        if shutil.which(command[0]):
            return command
    raise NoKustomize("neither kubectl nor kustomize is installed")


def render(overlay: str) -> list[Manifest]:
    """The objects of an overlay.

    Raises:
        NoKustomize: nothing can render it.
        ValueError: kustomize refuses it.
    """
    done = subprocess.run(
        [*kustomize(), str(ROOT / overlay)], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise ValueError(f"{overlay}: {done.stderr.strip()}")
    return list(yaml.safe_load_all(done.stdout))


def named(manifest: Manifest) -> str:
    """As kubectl names an object: `deployment/idspam`."""
    return f"{manifest['kind'].lower()}/{manifest['metadata']['name']}"


def pods(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """The pods that objects start, as `metadata` and `spec`, with the names of the objects."""
    for manifest in manifests:
        match manifest["kind"]:
            case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
                yield named(manifest), manifest["spec"]["template"]
            case "InferenceService":
                yield named(manifest), predictor_pod(manifest)


# Of a predictor, what is not a field of a pod: KServe's component and what it scales by.
PREDICTOR_FIELDS = frozenset(
    {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "labels", "annotations"}
)


def predictor_pod(manifest: Manifest) -> Manifest:
    """The pod of an InferenceService, as KServe makes it from a predictor with containers."""
    predictor = manifest["spec"]["predictor"]
    return {
        "metadata": {"labels": predictor.get("labels", {})},
        "spec": {key: value for key, value in predictor.items() if key not in PREDICTOR_FIELDS},
    }
