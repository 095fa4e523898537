"""promtool runs the alert rules on made-up histories; every alert is documented."""

import re
import subprocess
from itertools import groupby
from pathlib import Path

import pytest

from tests.support.prometheus import CONFIG, binary
from tests.support.promql import RULES, alert_expressions, selectors
from tests.support.service_process import TREE

HISTORIES = (CONFIG / "rules_test.yaml").read_text()
ALERTS = re.findall(r"- alert: (\w+)", RULES)


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        [binary("promtool"), *arguments],
        cwd=CONFIG,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", "rules.yaml")
    promtool("check", "config", "prometheus.yaml")


@pytest.mark.slow
def test_every_alert_fires_on_a_made_up_history_and_none_on_a_healthy_one() -> None:
    promtool("test", "rules", "rules_test.yaml")


@pytest.mark.slow
def test_promtool_notices_a_rule_that_never_fires(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        RULES.replace("== 0\n        for: 1m", "== 2\n        for: 1m")
    )
    (tmp_path / "rules_test.yaml").write_text(HISTORIES)
    command = [binary("promtool"), "test", "rules", str(tmp_path / "rules_test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "IdSpamDown" in done.stdout + done.stderr


def test_every_alert_has_a_history_before_and_after_it_fires() -> None:
    tests = HISTORIES.split("  - name: ")[1:]
    for alert in ALERTS:
        histories = [test for test in tests if f"alertname: {alert}\n" in test]
        assert histories, f"no history in which {alert} fires"
        assert any(f"alertname: {alert}, eval_time" in test for test in histories), alert


def test_the_healthy_history_has_every_series_that_an_alert_looks_at() -> None:
    healthy = HISTORIES.split("  - name: ")[1]
    assert healthy.startswith("a healthy service is silent")
    needed = {name for name, _ in selectors(alert_expressions())}
    present = set(re.findall(r"series: '(\w+)\{", healthy))
    assert needed <= present, needed - present


def test_every_alert_has_a_severity_a_summary_and_a_section_in_the_runbook() -> None:
    page = (TREE / "docs" / "operate.md").read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"(?m)^#+ (.+)$", page)
    }
    alerts = RULES.split("- alert: ")[1:]
    assert len(alerts) == len(ALERTS) >= 10
    for text in alerts:
        name = text.split()[0]
        assert re.search(r"severity: (critical|warning)\b", text), name
        for key in ("summary", "description", "runbook"):
            assert re.search(rf"{key}: \S", text), f"{name} has no {key}"
        runbook = re.search(r"runbook: docs/operate\.md#(\S+)", text)
        assert runbook, name
        assert runbook[1] in anchors, f"docs/operate.md has no section {runbook[1]}"


def test_names_of_alerts_differ() -> None:
    assert [len(list(same)) for _, same in groupby(sorted(ALERTS))] == [1] * len(ALERTS)
