"""`make compose-test`: runs compose.yaml on a real Docker, step by step, from build to `down`.

Needs Docker, compose (v1 or v2), openssl and Python's standard library. It uses its own project
name, ports and volumes, and always removes them. Its output is a transcript.
"""

import json
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parent.parent
FILE = "deploy/compose.yaml"
NAME, ADAPTER = "compose-test", "adapters/zoo/sms-spam.safetensors"
TEXTS = [
    "WINNER!! You have won a free ticket, call 09061701461 now",
    "see you at eight, I bring the cake",
]
ALERTS = (TREE / "deploy/prometheus/rules.yaml").read_text().count("- alert:")
KEYS_FILE = "/var/lib/idspam/keys/keys.jsonl"
READY_SECONDS, SCRAPED_SECONDS, PULL_SECONDS = 180, 90, 300


class Failed(Exception):
    """A step did not do what it should."""


class Stack:
    """A compose project and the addresses of its three servers."""

    def __init__(self) -> None:
        self.project = f"idspam-test-{secrets.token_hex(3)}"
        service, prometheus, grafana = (_free_port() for _ in range(3))
        self.service = f"http://127.0.0.1:{service}"
        self.prometheus = f"http://127.0.0.1:{prometheus}"
        self.grafana = f"http://127.0.0.1:{grafana}"
        ports = {"IDSPAM": service, "PROMETHEUS": prometheus, "GRAFANA": grafana}
        self._compose = _compose()
        self.has_grafana = _has_grafana()
        # Settings in the shell are meant for another service, not for this test.
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("IDSPAM_")},
            "COMPOSE_PROFILES": "cpu" if self.has_grafana else "no-grafana",
            **{f"{key}_PORT": str(port) for key, port in ports.items()},
        }

    def compose(self, *arguments: str, shown: Callable[[str], bool] = lambda _: True) -> None:
        """Run compose and print the lines that matter; if it fails, all of them."""
        command = [*self._compose, "-f", FILE, *arguments]
        _say(f"$ {' '.join(command)}")
        # Not printed: the project's name only keeps it apart from other projects.
        command[len(self._compose) : len(self._compose)] = ["-p", self.project]
        began = time.monotonic()
        done = _run(command, self._environment)
        if done.returncode:
            raise Failed(f"{done.stdout}\nexit status {done.returncode}")
        for line in done.stdout.splitlines():
            if shown(line):
                _say(f"  {line.strip()}".replace(f"{self.project}_", "").replace(self.project, ""))
        _say(f"  ({time.monotonic() - began:.0f} s)")

    def output(self, *arguments: str, status: int = 0) -> str:
        """What a compose command prints; it must end with this status."""
        command = [*self._compose, "-f", FILE, *arguments]
        _say(f"$ {' '.join(command)}")
        command[len(self._compose) : len(self._compose)] = ["-p", self.project]
        done = _run(command, self._environment)
        _require(done.returncode == status, f"{done.stdout}\nexit status {done.returncode}")
        return done.stdout

    def set(self, **variables: str) -> None:
        """Variables of compose.yaml from now on."""
        self._environment |= variables

    def remove(self) -> None:
        """Remove everything of this project, volumes included."""
        self.compose(
            *("down", "--volumes", "--remove-orphans", "--timeout", "60"),
            shown=lambda line: "emov" in line and "..." not in line,
        )


def main() -> int:
    try:
        stack = Stack()
        try:
            _test(stack)
        finally:
            stack.remove()
        for kind in ("container", "volume", "network"):
            own = f"label=com.docker.compose.project={stack.project}"
            left = _run(["docker", kind, "ls", "-q", "--filter", own]).stdout.split()
            _require(not left, f"{kind}s are left: {left}")
    except Failed as error:
        _say(f"compose-test: FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    _say("compose-test: passed")
    return 0


def _test(stack: Stack) -> None:
    stack.compose("build", "service", "demo", shown=lambda line: line.startswith("setup:"))
    for image in ("service", "client"):
        version = os.environ.get("VERSION") or _default("VERSION")
        _say(f"  {_sized(f'id-spam-{image}:{version}')}")
    stack.compose("up", "-d", shown=lambda _: False)
    _say(f"  {_ready(stack)}")
    _say("# the image lists what it contains")
    _say(f"  {_packages(os.environ.get('VERSION') or _default('VERSION'))}")

    _say(f"# upload {ADAPTER} under another name, and ask it")
    published = _json(
        f"{stack.service}/v1/adapters/{NAME}", method="PUT", body=(TREE / ADAPTER).read_bytes()
    )
    _say(f"  {published}")
    revision = published["revision"]
    _predict(stack, revision)

    _say("# Prometheus has the series, and the alert rules")
    query = f'sum by (adapter) (idspam_predictions_total{{adapter="{NAME}"}})'
    _say(f"  {query} = {_wait(lambda: _value(stack, query) == len(TEXTS) and len(TEXTS))}")
    rules = _wait(lambda: _alerts(stack))
    _say(f"  {len(rules)} alert rules, state of each: {', '.join(sorted(set(rules.values())))}")
    _say(f"  {' '.join(rules)}")

    if stack.has_grafana:
        _say("# Grafana has the dashboard and its data source")
        board = _wait(lambda: _json(f"{stack.grafana}/api/dashboards/uid/id-spam")["dashboard"])
        _say(f"  {board['title']}: {len(board['panels'])} panels")

    stack.compose(
        *("run", "--rm", "-T", "demo", "demo", "--url", "http://service:8000", "--seconds", "8"),
        shown=lambda line: line.startswith("demo:"),
    )

    stack.compose("restart", "--timeout", "60", "service", shown=lambda _: False)
    _say(f"  {_ready(stack)}")
    _predict(stack, revision)
    _say("# another container: only its volume is the same")
    stack.compose("up", "-d", "--force-recreate", "--no-deps", "service", shown=lambda _: False)
    _say(f"  {_ready(stack)}")
    _predict(stack, revision)
    with tempfile.TemporaryDirectory() as folder:
        tokens = _keys(stack, Path(folder))
        _https(stack, Path(folder), tokens["all"])


def _keys(stack: Stack, folder: Path) -> dict[str, str]:
    """Published beyond this machine it needs keys; with keys it asks for them, also Prometheus.

    Returns tokens by their scope.
    """
    _say("# published beyond this machine without keys: it does not start")
    settings = ("-e", "IDSPAM_PUBLISHED=0.0.0.0", "-e", "IDSPAM_ADAPTER_DIR=/tmp/adapters")
    refused = stack.output("run", "--rm", "-T", "--no-deps", *settings, "service", status=2)
    line = next((line for line in refused.splitlines() if line.startswith("service: ")), "")
    _require("without keys lets everybody in" in line, refused)
    _say(f"  {line}")

    _say("# with keys, kept in a volume")
    create = ("run", "--rm", "-T", "--no-deps", "service", "keys", "create")
    tokens = {}
    for name in ("all", "metrics"):
        shown = stack.output(*create, name, "--scopes", name, "--file", KEYS_FILE)
        found = re.search(r"idspam_[0-9a-f]{12}_\S{43}", shown)
        _require(found is not None, shown)
        assert found is not None
        tokens[name] = found[0]
    # Prometheus runs as another user.
    (folder / "token").write_text(tokens["metrics"])
    (folder / "token").chmod(0o644)
    folder.chmod(0o755)
    stack.set(IDSPAM_KEYS_FILE=KEYS_FILE, METRICS_TOKEN_FILE=str(folder / "token"))
    stack.compose("up", "-d", shown=lambda _: False)
    _wait(lambda: _json(f"{stack.service}/readyz"), seconds=READY_SECONDS)
    _require(_status(f"{stack.service}/v1/adapters") == 401, "a request without a key was answered")
    _require(_status(f"{stack.service}/v1/adapters", tokens["metrics"]) == 403, "a wrong scope")
    _require(_status(f"{stack.service}/v1/adapters", tokens["all"]) == 200, "a good key")
    _say("  /v1/adapters without a key: 401; for metrics alone: 403; for all: 200")
    _scraped(stack)
    return tokens


def _https(stack: Stack, folder: Path, token: str) -> None:
    """With a certificate it speaks HTTPS, and so do its health check, Prometheus and the demo."""
    _say("# HTTPS")
    tls = folder / "tls"
    tls.mkdir(mode=0o755)
    names = "subjectAltName=IP:127.0.0.1,DNS:service"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "2"),
        *("-subj", "/CN=compose-test", "-addext", names),
        *("-keyout", str(tls / "key.pem"), "-out", str(tls / "cert.pem")),
    ]
    done = _run(command)
    _require(done.returncode == 0, done.stdout)
    # The service runs as another user.
    (tls / "key.pem").chmod(0o644)
    inside = "/var/lib/idspam/tls"
    certificate = {"IDSPAM_TLS_CERT": f"{inside}/cert.pem", "IDSPAM_TLS_KEY": f"{inside}/key.pem"}
    stack.set(**certificate, TLS_FOLDER=str(tls), SERVICE_SCHEME="https")
    trusted = ssl.create_default_context(cafile=str(tls / "cert.pem"))
    url = stack.service.replace("http://", "https://")
    stack.compose("up", "-d", shown=lambda _: False)
    _wait(lambda: _status(f"{url}/readyz", trusted=trusted) == 200, seconds=READY_SECONDS)
    _require(_status(f"{url}/v1/adapters", token, trusted) == 200, "a good key")
    _say("  /v1/adapters over HTTPS, its certificate verified: 200")
    alive = stack.output("exec", "-T", "service", "python", "-S", "deploy/alive.py")
    _say(f"  {alive.strip()}")
    _scraped(stack)
    stack.set(ID_SPAM_API_KEY=token, ID_SPAM_CA=f"{inside}/cert.pem")
    stack.compose(
        *("run", "--rm", "-T", "demo", "demo", "--url", "https://service:8000", "--seconds", "8"),
        shown=lambda line: line.startswith("demo:"),
    )


def _scraped(stack: Stack) -> None:
    """Prometheus gets the service's metrics, with a key if it needs one."""
    up = 'up{job="id-spam"}'
    began = time.time()
    _wait(lambda: (_value(stack, up) == 1) and _value(stack, f"timestamp({up}) > {began:.0f}"))
    _say(f"  {up} = 1")


def _status(url: str, token: str = "", trusted: ssl.SSLContext | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30, context=trusted) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _packages(version: str) -> str:
    """The CycloneDX document of the service's image, in a line."""
    file = "/usr/share/doc/id-spam-service/sbom.cdx.json"
    command = ["docker", "run", "--rm", "--entrypoint", "cat", f"id-spam-service:{version}", file]
    document = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    names = {item["name"] for item in document["components"]}
    _require({"torch", "uvicorn", "safetensors"} <= names, f"{file} lists only {sorted(names)}")
    return f"{document['bomFormat']} {document['specVersion']}: {len(names)} packages"


def _predict(stack: Stack, revision: str) -> None:
    body = json.dumps({"adapter": NAME, "inputs": TEXTS, "top_k": 1}).encode()
    results = _json(f"{stack.service}/v1/predict", body=body)["results"]
    for text, result in zip(TEXTS, results, strict=True):
        _require(result["revision"] == revision, f"answered by {result['revision']}")
        _say(f"  {text!r}: {result['label']} {result['score']:.4f}, revision {revision[:12]}")


def _ready(stack: Stack) -> str:
    began = time.monotonic()
    health = _wait(lambda: _json(f"{stack.service}/readyz"), seconds=READY_SECONDS)
    _require(health["status"] == "ok", str(health))
    metrics = _text(f"{stack.service}/metrics").splitlines()
    build = next(line for line in metrics if "_build_info{" in line)
    return f"ready after {time.monotonic() - began:.0f} s: {build}"


def _value(stack: Stack, query: str) -> float | None:
    parameters = urllib.parse.urlencode({"query": query})
    series = _json(f"{stack.prometheus}/api/v1/query?{parameters}")["data"]["result"]
    return float(series[0]["value"][1]) if series else None


def _alerts(stack: Stack) -> dict[str, str] | None:
    """The state of every alert by name, once all rules have been evaluated."""
    groups = _json(f"{stack.prometheus}/api/v1/rules?type=alert")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    if len(rules) < ALERTS or any(rule["health"] != "ok" for rule in rules):
        return None
    return {rule["name"]: rule["state"] for rule in rules}


def _has_grafana() -> bool:
    """Whether Grafana's image is here or can be pulled."""
    image = os.environ.get("GRAFANA_IMAGE") or _default("GRAFANA_IMAGE")
    if _run(["docker", "image", "inspect", image]).returncode == 0:
        return True
    _say(f"$ docker pull {image}")
    if _run(["docker", "pull", "-q", image], seconds=PULL_SECONDS).returncode == 0:
        return True
    _say("  cannot be pulled here, so this run is without Grafana: COMPOSE_PROFILES=no-grafana")
    return False


def _sized(image: str) -> str:
    done = _run(["docker", "image", "inspect", "--format", "{{.Size}}", image])
    _require(done.returncode == 0, done.stdout)
    return f"{image}: {int(done.stdout) / 1e9:.2f} GB"


def _default(variable: str) -> str:
    """The default of a variable of compose.yaml."""
    match = re.search(rf"\$\{{{variable}:-([^}}]*)\}}", (TREE / FILE).read_text())
    assert match, f"compose.yaml has no variable {variable}"
    return match[1]


def _compose() -> list[str]:
    if shutil.which("docker") is None or (done := _run(["docker", "info"])).returncode:
        raise Failed("no Docker engine answers `docker info`: install and start one")
    version = next(line for line in done.stdout.splitlines() if "Server Version" in line)
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not (done := _run([*command, "version"])).returncode:
            _say(f"Docker {version.split()[-1]}, {done.stdout.splitlines()[0]}")
            return command
    raise Failed("neither `docker compose` nor `docker-compose` is installed")


def _run(
    command: Sequence[str], environment: dict[str, str] | None = None, seconds: float = 3600
) -> "subprocess.CompletedProcess[str]":
    to_pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        return subprocess.run(
            command, cwd=TREE, env=environment, check=False, timeout=seconds, **to_pipe
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, f"still running after {seconds:g} s")


def _wait(look: Callable[[], Any], *, seconds: float = SCRAPED_SECONDS) -> Any:
    """The first result that is not empty; until then it asks again, also if nothing answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := look():
                return result
            reason = "the result is empty"
        except (OSError, ValueError) as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds:g} s: {reason}")
        time.sleep(1)


def _json(url: str, *, method: str | None = None, body: bytes | None = None) -> Any:
    return json.loads(_text(url, method=method, body=body))


def _text(url: str, *, method: str | None = None, body: bytes | None = None) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Failed(reason)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
