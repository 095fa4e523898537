"""The level `restricted` of Kubernetes' Pod Security Standards, for the fields that a pod can have.

The API server checks the same where the namespace has `pod-security.kubernetes.io/enforce:
restricted`. Here it is checked before anything is applied.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_VOLUMES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_PROFILES = ("RuntimeDefault", "Localhost")
_SAFE_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.tcp_wmem",
    }
)


def violations(pod: Mapping[str, Any]) -> Iterator[str]:
    """What `restricted` forbids in a pod's `spec`, a sentence each."""
    yield from _of_the_pod(pod)
    for container in [
        container
        for kind in ("initContainers", "containers", "ephemeralContainers")
        for container in pod.get(kind, ())
    ]:
        for fault in _of_a_container(container, pod.get("securityContext", {})):
            yield f"container {container['name']}: {fault}"


def _of_the_pod(pod: Mapping[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field} is true"
    for volume in pod.get("volumes", ()):
        for kind in sorted(set(volume) - {"name"} - _VOLUMES):
            yield f"volume {volume['name']}: {kind} is not allowed"
    for sysctl in pod.get("securityContext", {}).get("sysctls", ()):
        if sysctl["name"] not in _SAFE_SYSCTLS:
            yield f"sysctl {sysctl['name']} is not allowed"


def _of_a_container(container: Mapping[str, Any], of_pod: Mapping[str, Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**of_pod, **own}
    capabilities = own.get("capabilities", {})
    if own.get("privileged"):
        yield "privileged is true"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if "ALL" not in capabilities.get("drop", ()):
        yield "capabilities: ALL is not dropped"
    for added in capabilities.get("add", ()):
        if added != "NET_BIND_SERVICE":
            yield f"capabilities: {added} is added"
    if both.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if both.get("runAsUser") == 0:
        yield "runAsUser is 0"
    if both.get("seccompProfile", {}).get("type") not in _PROFILES:
        yield f"seccompProfile is not one of {', '.join(_PROFILES)}"
    if own.get("procMount", "Default") != "Default":
        yield "procMount is not Default"
    for port in container.get("ports", ()):
        if port.get("hostPort"):
            yield f"hostPort {port['hostPort']}"
    for when in ("postStart", "preStop"):
        action = container.get("lifecycle", {}).get(when, {})
        if action.get("httpGet", {}).get("host") or action.get("tcpSocket", {}).get("host"):
            yield f"{when} asks another host"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container.get(probe, {})
        if asked.get("httpGet", {}).get("host") or asked.get("tcpSocket", {}).get("host"):
            yield f"{probe} asks another host"
