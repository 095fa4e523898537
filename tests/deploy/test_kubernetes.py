"""The Kubernetes manifests are valid, fit the service, and are as confined as a pod can be."""

import copy
import json
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from adapters import __version__
from deploy.kubernetes_test import KSERVE
from deploy.manifests import (
    OVERLAYS,
    PREDICTOR_FIELDS,
    ROOT,
    Manifest,
    NoKustomize,
    named,
    pods,
    predictor_pod,
    render,
)
from deploy.pod_security import violations
from service.access.scopes import needs
from service.observability.metrics import METRICS
from service.settings import Settings, read_settings
from tests.support.prometheus import binary
from tests.support.service_process import TREE
from tests.support.third_party.environment import python
from tests.support.unavailable import unavailable

DOCKERFILE = (TREE / "Dockerfile").read_text()
PAGE = (TREE / "docs" / "kubernetes.md").read_text()
# The oldest that has every field for good, and the newest that there are schemas for.
VERSIONS = ("1.31", kubernetes_validate.latest_version())
CUSTOM = {"ServiceMonitor", "InferenceService"}
REPLICATED = ("overlays/s3", "overlays/folder", "overlays/gpu-s3")
# A supervisor takes at most this long in addition to draining.
ENDING_SECONDS = 15.0


@cache
def objects(overlay: str) -> tuple[Manifest, ...]:
    try:
        return tuple(render(overlay))
    except NoKustomize as error:
        unavailable(str(error))


def one(overlay: str, kind: str, name: str = "idspam") -> Any:
    (found,) = (
        item
        for item in objects(overlay)
        if item["kind"] == kind and item["metadata"]["name"] == name
    )
    return found


def pod(overlay: str) -> Any:
    ((_, found),) = pods(objects(overlay))
    return found


def container(overlay: str) -> Any:
    (found,) = pod(overlay)["spec"]["containers"]
    return found


def environment(overlay: str) -> dict[str, str]:
    """The variables that the container gets, less those from secrets."""
    found = {item["name"]: item["value"] for item in container(overlay)["env"] if "value" in item}
    for source in container(overlay)["envFrom"]:
        found |= one(overlay, "ConfigMap", source["configMapRef"]["name"])["data"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_schemas_of_kubernetes_accept_every_object(overlay: str, version: str) -> None:
    for item in objects(overlay):
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)
        if item["kind"] == "InferenceService":
            made = {"apiVersion": "v1", "kind": "Pod", **predictor_pod(item)}
            kubernetes_validate.validate(made, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    wrong = copy.deepcopy(dict(one("base", "Deployment")))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_in_the_namespace_that_comes_with_it(overlay: str) -> None:
    (namespace,) = (item for item in objects(overlay) if item["kind"] == "Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for item in objects(overlay):
        if item is not namespace:
            assert item["metadata"]["namespace"] == namespace["metadata"]["name"], named(item)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_and_write_only_to_volumes(overlay: str) -> None:
    for name, item in pods(objects(overlay)):
        assert not list(violations(item["spec"])), name
        assert item["spec"]["automountServiceAccountToken"] is False
        for own in item["spec"]["containers"]:
            assert own["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"securityContext": {"runAsNonRoot": True}}, "seccompProfile"),
        ({"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}, "runAsNonRoot"),
        ({"containers.securityContext": {"capabilities": {"drop": ["ALL"]}}}, "Escalation"),
        ({"containers.securityContext": {"allowPrivilegeEscalation": False}}, "not dropped"),
        ({"containers.securityContext": {"privileged": True}}, "privileged"),
        ({"containers.securityContext": {"runAsUser": 0}}, "runAsUser"),
        ({"containers.securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}}, "SYS_ADMIN"),
        ({"containers.ports": [{"containerPort": 1, "hostPort": 1}]}, "hostPort"),
    ],
)
def test_a_pod_that_is_less_confined_is_found(change: Mapping[str, Any], said: str) -> None:
    spec = copy.deepcopy(pod("base")["spec"])
    for key, value in change.items():
        place = spec["containers"][0] if key.startswith("containers.") else spec
        place[key.removeprefix("containers.")] = value
    assert any(said in fault for fault in violations(spec))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_is_a_setting_with_a_value_that_the_service_takes(overlay: str) -> None:
    settings = read_settings(environment(overlay))
    secrets = {item["name"] for item in container(overlay)["env"]} & {"IDSPAM_KEYS"}
    assert secrets, "a pod listens on all addresses, so it needs keys"
    assert settings.log_format == "json"
    if "gpu" in overlay:
        assert settings.device == "cuda"
        cores = int(container(overlay)["resources"]["limits"]["cpu"])
        assert settings.workers == cores * 3 // 4


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_image_is_the_one_that_is_built_here(overlay: str) -> None:
    expected = f"id-spam-service:{__version__}" + ("-gpu" if "gpu" in overlay else "")
    assert container(overlay)["image"] == expected
    compose = (TREE / "deploy" / "compose.yaml").read_text()
    assert f"image: id-spam-service:${{VERSION:-{__version__}}}" in compose


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_and_probes_are_those_of_the_service(overlay: str) -> None:
    own = container(overlay)
    (port,) = own["ports"]
    assert f"EXPOSE {port['containerPort']}\n" in DOCKERFILE
    assert port["containerPort"] == Settings().port
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = own[probe]["httpGet"]
        need = needs().get(("GET", asked["path"]))
        assert need is not None, probe
        assert need.is_probe, probe
        assert asked["port"] == port["name"]
    # Live while it loads; ready only when it can answer.
    assert own["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert own["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_user_and_the_folders_are_those_of_the_image(overlay: str) -> None:
    spec = pod(overlay)["spec"]
    uid = int(re.findall(r"useradd --uid (\d+)", DOCKERFILE)[-1])
    context = spec["securityContext"]
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == uid
    folders = set(re.findall(r'"(/[^"]+)"', DOCKERFILE[DOCKERFILE.rindex("\nVOLUME") :]))
    mounted = {item["mountPath"] for item in container(overlay)["volumeMounts"]}
    # Keys come from a Secret as a variable.
    assert folders - {"/var/lib/idspam/keys"} <= mounted
    assert "/tmp" in mounted
    names = {item["name"] for item in spec["volumes"]}
    assert {item["name"] for item in container(overlay)["volumeMounts"]} == names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_is_given_time_to_drain(overlay: str) -> None:
    command, seconds = container(overlay)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    drain = read_settings(environment(overlay)).drain_seconds
    needed = float(seconds) + drain + ENDING_SECONDS
    assert pod(overlay)["spec"]["terminationGracePeriodSeconds"] >= needed


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_selects_the_pods(overlay: str) -> None:
    labels = pod(overlay)["metadata"]["labels"]
    selectors = {
        "budget": one(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        "policy": one(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    }
    for spread in pod(overlay)["spec"]["topologySpreadConstraints"]:
        selectors[spread["topologyKey"]] = spread["labelSelector"]["matchLabels"]
    if overlay != "kserve":
        selectors["deployment"] = one(overlay, "Deployment")["spec"]["selector"]["matchLabels"]
        selectors["service"] = one(overlay, "Service")["spec"]["selector"]
    for name, selector in selectors.items():
        assert selector, name
        assert selector.items() <= labels.items(), name


def test_clients_are_named_by_one_label_alone() -> None:
    """kustomize adds `includeSelectors` to the peers of a policy, too."""
    (rule,) = one("base", "NetworkPolicy")["spec"]["ingress"]
    for peer in rule["from"]:
        ((_, selector),) = peer.items()
        assert selector == {"matchLabels": {"idspam-client": "true"}}
    (port,) = rule["ports"]
    assert port["port"] == container("base")["ports"][0]["name"]
    denied = one("base", "NetworkPolicy", "idspam-default-deny")["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("overlay", REPLICATED)
def test_replicas_share_a_store_and_no_folder_of_their_own(overlay: str) -> None:
    deployment = one(overlay, "Deployment")["spec"]
    assert "replicas" not in deployment, "the autoscaler decides"
    assert deployment["strategy"]["type"] == "RollingUpdate"
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    volumes = {item["name"]: item for item in pod(overlay)["spec"]["volumes"]}
    assert "emptyDir" in volumes["adapters"]
    claims = [item for item in objects(overlay) if item["kind"] == "PersistentVolumeClaim"]
    for claim in claims:
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    store = environment(overlay)["IDSPAM_ADAPTER_STORE"]
    if store.startswith("/"):
        assert store in {item["mountPath"] for item in container(overlay)["volumeMounts"]}


@pytest.mark.parametrize("overlay", ["base", "overlays/gpu"])
def test_a_service_that_owns_its_folder_is_alone(overlay: str) -> None:
    deployment = one(overlay, "Deployment")["spec"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}
    assert not [item for item in objects(overlay) if item["kind"] == "HorizontalPodAutoscaler"]


ADAPTER_RULES = yaml.safe_load((ROOT / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
# As Prometheus names the series of the service.
SERIES = {metric.name for metric in METRICS} | {
    f"{metric.name}_{part}"
    for metric in METRICS
    if metric.kind.__name__ == "Histogram"
    for part in ("sum", "count", "bucket")
}


@pytest.mark.parametrize("overlay", REPLICATED)
def test_the_autoscaler_reads_waiting_tokens_by_a_rule_of_the_adapter(overlay: str) -> None:
    scaler = one(overlay, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == one(overlay, "Deployment")["metadata"]["name"]
    asked = {item["pods"]["metric"]["name"] for item in scaler["metrics"] if "pods" in item}
    assert "idspam_waiting_tokens" in asked
    assert asked <= {rule["name"]["as"] for rule in ADAPTER_RULES}
    assert scaler["minReplicas"] >= 2


def expression(rule: Mapping[str, Any]) -> str:
    """A rule's query as the adapter asks it for the pods of a namespace."""
    series = rule["seriesQuery"].partition("{")[0]
    query = str(rule["metricsQuery"])
    for part, value in (
        ("<<.Series>>", series),
        ("<<.LabelMatchers>>", 'namespace="idspam",pod=~"a|b"'),
        ("<<.GroupBy>>", "pod"),
    ):
        query = query.replace(part, value)
    assert "<<" not in query
    return query


def test_the_rules_of_the_adapter_give_each_pod_its_own_figure(tmp_path: Path) -> None:
    samples = []
    for rule in ADAPTER_RULES:
        series = rule["seriesQuery"].partition("{")[0]
        assert series in SERIES
        history = "0+3x40" if series.endswith("_sum") else "100 300x40"
        for name in ("a", "b"):
            labels = f'{{namespace="idspam",pod="{name}"}}'
            samples.append({"series": series + labels, "values": history})
        samples.append({"series": f'{series}{{namespace="other",pod="a"}}', "values": "9x40"})
    expected = {"idspam_waiting_tokens": 300, "idspam_device_busy": 3 / 15}
    tests = [
        {
            "interval": "15s",
            "input_series": samples,
            "promql_expr_test": [
                {
                    "expr": expression(rule),
                    "eval_time": "5m",
                    "exp_samples": [
                        {"labels": f'{{pod="{name}"}}', "value": expected[rule["name"]["as"]]}
                        for name in ("a", "b")
                    ],
                }
                for rule in ADAPTER_RULES
            ],
        }
    ]
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": [], "tests": tests}))
    done = subprocess.run(
        [binary("promtool"), "test", "rules", str(tmp_path / "test.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("overlay", ["overlays/gpu", *REPLICATED])
def test_the_monitor_scrapes_the_service_with_a_key(overlay: str) -> None:
    monitor = one(overlay, "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    service = one(overlay, "Service")
    selector = monitor["spec"]["selector"]["matchLabels"]
    assert selector.items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    need = needs().get(("GET", endpoint["path"]))
    assert need is not None
    assert need.scopes == {"metrics"}
    assert set(endpoint["authorization"]["credentials"]) == {"name", "key"}


def test_the_predictor_is_the_pod_of_the_base() -> None:
    service = one("kserve", "InferenceService")
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    predictor = service["spec"]["predictor"]
    assert set(predictor) - set(pod("base")["spec"]) <= PREDICTOR_FIELDS
    ours, base = copy.deepcopy(pod("kserve")["spec"]), copy.deepcopy(pod("overlays/s3")["spec"])
    # The name by which KServe finds the container that answers.
    assert ours["containers"][0].pop("name") == "kserve-container"
    del base["containers"][0]["name"]
    for spec in (ours, base):
        spec["containers"][0]["env"].sort(key=lambda item: item["name"])
    assert ours == base
    assert needs()["GET", "/v2/health/ready"].is_probe


@pytest.mark.slow
def test_kserve_knows_every_field_of_the_predictor() -> None:
    spec = one("kserve", "InferenceService")["spec"]
    known_of_spec, known_of_predictor = json.loads(python("-c", KSERVE))
    assert set(spec) <= set(known_of_spec)
    assert set(spec["predictor"]) <= set(known_of_predictor)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_page_names_each_overlay_and_each_secret(overlay: str) -> None:
    assert f"deploy/kubernetes/{overlay}" in PAGE
    for name in re.findall(r"'secretKeyRef': {[^}]*'name': '([\w-]+)'", str(container(overlay))):
        assert f"secret generic {name}" in PAGE
