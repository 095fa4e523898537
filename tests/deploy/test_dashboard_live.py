"""A real Prometheus scrapes a real service under the demo's load: every panel gets data."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from deploy.panel_pictures import main as draw
from deploy.panels import ROWS
from tests.support.prometheus import binary, prometheus, wait_for
from tests.support.promql import DASHBOARD, panel_expressions
from tests.support.service_process import TREE, environ, service_process

SECONDS = 60.0


@contextmanager
def demo(url: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "service", "demo", "--url", url, "--rate", "12"]
    with subprocess.Popen(command, cwd=TREE, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_every_expression_returns_data_under_the_demos_load(workers: str, tmp_path: Path) -> None:
    binary("prometheus")
    # Room for fewer adapters than there are, so that some are evicted.
    environment = environ(
        Path("all-MiniLM-L6-v2"),
        tmp_path / "adapters",
        ZOO_DIR="tree",
        WORKERS=workers,
        MAX_ACTIVE_ADAPTERS="2",
        MAX_REGISTERED_ADAPTERS="3",
    )
    queries = {
        text: _query(text)
        for text in panel_expressions()
        # No adapter of the zoo gives sets of labels or abstains. And a second revision evicts none
        # that answers, so it is not compared here; and a single service rolls nothing out.
        if not re.search(
            "idspam_(labels_given|abstentions|traffic_(compared|disagree|score)|rollout_seconds"
            "|replica)",
            text,
        )
    }
    variables = re.findall(r"label_values\((\w+), (\w+)\)", DASHBOARD.read_text())
    assert len(variables) == 2
    # Nobody reads the pipe that it logs to: it would fill up.
    environment["IDSPAM_LOG_LEVEL"] = "warning"
    with service_process(environment) as service:
        assert service.stdout is not None
        url = service.stdout.readline().split()[1]
        with prometheus(tmp_path, url) as server, demo(url) as load:

            def missing() -> list[str]:
                return [text for text, query in queries.items() if not server.values(query)]

            def check_alive() -> None:
                assert load.poll() is None
                assert service.poll() is None

            left = wait_for(missing, seconds=SECONDS, meanwhile=check_alive)
            assert not left, "\n".join(left)
            _check_drift(url)
            for metric, label in variables:
                assert server.get(f"label/{label}/values", **{"match[]": metric})
            assert {"IdSpamDown"} <= {
                rule["name"]
                for group in server.get("rules", type="alert")["groups"]
                for rule in group["rules"]
            }
            load.send_signal(signal.SIGTERM)
            output, _ = load.communicate(timeout=20)
            assert load.returncode == 0
            assert re.search(r"\d+ answered", output.splitlines()[-1])
            if workers == "0":
                # Without the load beside it: it takes seconds of a core.
                _check_pictures(tmp_path / "pictures", str(server.client.base_url))
        names = [item["name"] for item in httpx.get(f"{url}/v1/adapters").json()["adapters"]]
        assert names == ["banking77", "clinc150", "sentiment", "sms-spam"]


def _check_pictures(folder: Path, prometheus_url: str) -> None:
    words = ["--prometheus", prometheus_url, "--output", str(folder), "--minutes", "1"]
    assert draw([*words, "--rate-interval", "15s", "--theme", "dark"]) == 0
    pictures = sorted(folder.glob("*-dark.png"))
    assert len(pictures) == 1 + len(ROWS)
    assert all(picture.stat().st_size > 5000 for picture in pictures)


def _check_drift(url: str) -> None:
    """The demo does not write like a bank's customers: the zoo's profiles show it."""
    drift = httpx.get(f"{url}/v1/adapters/banking77/drift").json()
    levels = {item["quantity"]: item["level"] for item in drift["quantities"]}
    assert levels["confidence"] == "large", drift


def _query(text: str) -> str:
    """The expression as Grafana would send it, for a scrape every second."""
    for variable, value in (
        ("$__rate_interval", "15s"),
        ("$__range", "60s"),
        ("$instance", ".*"),
        ("$adapter", ".*"),
    ):
        text = text.replace(variable, value)
    assert "$" not in text
    return text
