"""The PromQL of the dashboard and of the alert rules, and the series that it selects."""

import json
import re
from collections.abc import Iterator

from tests.support.prometheus import CONFIG
from tests.support.service_process import TREE

RULES = (CONFIG / "rules.yaml").read_text()
DASHBOARD = TREE / "deploy" / "grafana" / "dashboards" / "id-spam.json"


def panel_expressions() -> list[str]:
    """All expressions of the dashboard's file."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alert_expressions() -> str:
    """The rules without names, comments and the texts that people read."""
    return re.sub(r"(?m)^ *(summary|description|runbook|- alert|- record|#).*$", "", RULES)


def selectors(text: str) -> Iterator[tuple[str, set[str]]]:
    """Each series that an expression selects, with the labels that it selects by."""
    names = r"(?<![\w:$])(up|idspam_\w+|process_\w+)\b(?!\s*:)(?:\{([^{}]*)\})?"
    for name, matchers in re.findall(names, text):
        # A label comes before an operator; the quoted text after it may contain anything.
        yield name, set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', matchers))
