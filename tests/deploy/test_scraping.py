"""A real Prometheus, as compose.yaml sets it up, scrapes the service over HTTPS."""

import re
import subprocess
from pathlib import Path

import pytest
import trustme

from tests.support.certificates import issue
from tests.support.prometheus import CONFIG, MOUNTED, binary, prometheus, wait_for
from tests.support.service_process import TREE, ready_service
from tests.support.tiny_models import save_backbone

COMPOSE = (TREE / "deploy" / "compose.yaml").read_text()
UP = 'up{job="id-spam"}'


@pytest.mark.slow
def test_prometheus_scrapes_a_service_that_speaks_https(tmp_path: Path) -> None:
    """Over HTTP: `test_dashboard_live.py`."""
    binary("prometheus")
    # Another name than the one that Prometheus asks for, as in compose.
    cert, key = issue(trustme.CA(), tmp_path, "classify.example.com")
    settings = {"TLS_CERT": str(cert), "TLS_KEY": str(key)}
    backbone = save_backbone(tmp_path / "backbone")
    with (
        ready_service(backbone, tmp_path, workers=0, **settings) as live,
        prometheus(tmp_path, live.url) as server,
    ):
        assert live.url.startswith("https://")

        def missing() -> list[str]:
            return [] if server.values(UP) == [1.0] else [f"{UP}: {server.values(UP)}"]

        assert wait_for(missing, seconds=20, meanwhile=lambda: None) == []
        (instance,) = server.get("query", query=UP)["result"]
        assert set(instance["metric"]) == {"__name__", "instance", "job"}


def test_compose_mounts_a_file_for_every_scheme_where_prometheus_reads_it() -> None:
    """And its default is HTTP, as the service's is."""
    (source,) = re.findall(rf"- (\S+):{MOUNTED}:ro", COMPOSE)
    assert source == "./prometheus/${SERVICE_SCHEME:-http}.yaml"
    for scheme in ("http", "https"):
        assert f"__scheme__: {scheme}}}" in (CONFIG / f"{scheme}.yaml").read_text()
    done = subprocess.run(
        [binary("promtool"), "check", "config", "--syntax-only", "prometheus.yaml"],
        cwd=CONFIG,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
