"""`make kubernetes-test`: renders every overlay and checks it without a cluster.

Schemas of Kubernetes for several versions; those of the Prometheus operator and of KServe where
their packages are installed; Pod Security `restricted`; checkov's rules where it is installed.
`make kubernetes-test` makes an environment with most of them, `make clients` the one of KServe. Its
output is a transcript.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Run by its path in an environment that has not this project's packages.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kubernetes_validate
import yaml

from deploy.manifests import OVERLAYS, Manifest, named, pods, predictor_pod, render
from deploy.pod_security import violations

TREE = Path(__file__).resolve().parent.parent
# Prints the fields of an InferenceService and of its predictor.
KSERVE = (
    "import json; from kserve import V1beta1InferenceServiceSpec as S, V1beta1PredictorSpec as P; "
    "print(json.dumps([list(kind.attribute_map.values()) for kind in (S, P)]))"
)
VERSIONS = ("1.31", "1.33", "1.35", kubernetes_validate.latest_version())
# Rules of checkov that do not hold here, and why.
ACCEPTED = {
    "CKV_K8S_35": "the keys are a variable: a Secret's files belong to root, and the service takes "
    "only a file that nobody else can read",
    "CKV_K8S_43": "the image is built here and has no registry yet: name it by digest yourself",
    "CKV_K8S_15": "the same: a tag of a version, not `latest`",
}


def main() -> int:
    failed = 0
    for overlay in OVERLAYS:
        manifests = render(overlay)
        _say(f"# {overlay}: {len(manifests)} objects: {', '.join(map(named, manifests))}")
        for check in (_kubernetes, _custom, _restricted, _checkov):
            faults = 0
            for line in check(manifests):
                faults += not line.startswith("ok: ")
                _say(f"  {line}")
            failed += faults
    _say(f"kubernetes-test: {f'FAILED: {failed} faults' if failed else 'passed'}")
    return 1 if failed else 0


def _kubernetes(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Strict: a field that Kubernetes does not know is a fault."""
    own = [item for item in manifests if "." not in item["apiVersion"] or _is_built_in(item)]
    made = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {}, **predictor_pod(item)}
        for item in manifests
        if item["kind"] == "InferenceService"
    ]
    for version in VERSIONS:
        faults = 0
        for item in (*own, *made):
            try:
                kubernetes_validate.validate(item, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                faults += 1
                where = ".".join(map(str, error.path))
                yield f"{named(item)}: {version}: {where}: {error.message}"
        if not faults:
            pod = ", and the predictor's pod" if made else ""
            yield f"ok: Kubernetes {version}: {len(own)} objects{pod}"


def _is_built_in(item: Manifest) -> bool:
    return str(item["apiVersion"]).partition("/")[0].endswith(".k8s.io")


def _custom(manifests: Sequence[Manifest]) -> Iterator[str]:
    for item in manifests:
        if item["kind"] == "ServiceMonitor":
            yield from _monitor(item)
        if item["kind"] == "InferenceService":
            yield from _predictor(item)


def _monitor(item: Manifest) -> Iterator[str]:
    if not _installed("cloudcoil"):
        yield f"ok: {named(item)}: not checked, cloudcoil-models-prometheus-operator is missing"
        return
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

    try:
        read = ServiceMonitor.model_validate(item)
    except ValueError as error:
        yield f"{named(item)}: {error}"
        return
    # The model ignores what it does not know; what it knows it gives back.
    again = read.model_dump(by_alias=True, exclude_unset=True, mode="json")
    lost = [key for key in _leaves(item["spec"]) if key not in set(_leaves(again["spec"]))]
    if lost:
        yield f"{named(item)}: unknown: {', '.join(lost)}"
    else:
        yield f"ok: {named(item)}: the schema of the Prometheus operator"


def _predictor(item: Manifest) -> Iterator[str]:
    python = TREE / "runs" / "clients" / "bin" / "python"
    if not python.exists():
        yield f"ok: {named(item)}: not checked, KServe's SDK is missing: make clients"
        return
    # Isolated (-I): this tree has packages with generic names.
    done = subprocess.run([str(python), "-I", "-c", KSERVE], capture_output=True, check=True)
    spec, predictor = json.loads(done.stdout)
    unknown = set(item["spec"]) - set(spec)
    unknown |= set(item["spec"]["predictor"]) - set(predictor)
    if unknown:
        yield f"{named(item)}: KServe does not know {', '.join(sorted(unknown))}"
    else:
        yield f"ok: {named(item)}: every field is one of KServe's SDK"


def _restricted(manifests: Sequence[Manifest]) -> Iterator[str]:
    for name, pod in pods(manifests):
        faults = list(violations(pod["spec"]))
        yield from (f"{name}: restricted: {fault}" for fault in faults)
        if not faults:
            yield f"ok: {name}: Pod Security Standard restricted"


def _checkov(manifests: Sequence[Manifest]) -> Iterator[str]:
    command = Path(sys.executable).with_name("checkov")
    if not command.exists():
        yield "ok: checkov is not installed: its rules are not checked"
        return
    # checkov does not check an InferenceService, so it is given the pod that KServe makes of it.
    shown: list[Any] = [dict(item) for item in manifests]
    for item in manifests:
        if item["kind"] == "InferenceService":
            name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
            made = predictor_pod(item)
            metadata = {"name": name, "namespace": namespace, **made["metadata"]}
            shown.append({"apiVersion": "v1", "kind": "Pod", **made, "metadata": metadata})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "all.yaml"
        file.write_text(yaml.safe_dump_all(shown))
        arguments = ("--framework", "kubernetes", "--output", "json", "--quiet", "--compact")
        done = subprocess.run(
            [str(command), "--file", str(file), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    try:
        answer = json.loads(done.stdout)
        results, summary = answer["results"], answer["summary"]
    except (ValueError, KeyError, TypeError):
        yield f"checkov: {(done.stderr or done.stdout)[-300:]}"
        return
    accepted: set[str] = set()
    for fault in results["failed_checks"]:
        if fault["check_id"] in ACCEPTED:
            accepted.add(fault["check_id"])
        else:
            yield f"{fault['resource']}: {fault['check_id']}: {fault['check_name']}"
    yield f"ok: checkov {summary['checkov_version']}: {summary['passed']} checks passed"
    for rule in sorted(accepted):
        yield f"ok: checkov {rule} is accepted: {ACCEPTED[rule]}"


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, f"{path}[]")
    else:
        yield path


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
