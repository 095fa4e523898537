"""The dashboard and the alert rules name what there is."""

import json
import re
from collections.abc import Iterator
from typing import Any

from prometheus_client import Histogram

from deploy.dashboard import FILE, dashboard
from deploy.panels import PREDICT, ROWS, STATS
from service.http.app import route_paths
from service.observability.metrics import METRICS
from tests.support.prometheus import CONFIG

RULES = (CONFIG / "rules.yaml").read_text()
# Prometheus' own, and those of its Python library's process collector.
FOREIGN = {
    "up": set[str](),
    "process_resident_memory_bytes": set[str](),
    "process_cpu_seconds_total": set[str](),
    "process_start_time_seconds": set[str](),
}
EVERYWHERE = {"instance", "job"}


def series() -> dict[str, set[str]]:
    """Every series of the service with its labels."""
    found = dict(FOREIGN)
    for metric in METRICS:
        if metric.kind is Histogram:
            found[f"{metric.name}_bucket"] = {*metric.labels, "le"}
            for part in ("sum", "count"):
                found[f"{metric.name}_{part}"] = set(metric.labels)
        else:
            found[metric.name] = set(metric.labels)
    return found


def selectors(text: str) -> Iterator[tuple[str, set[str]]]:
    """Metrics and the labels that they are chosen by."""
    names = r"(?<![\w:$])(up|idspam_\w+|process_\w+)\b(?!\s*:)(?:\{([^{}]*)\})?"
    for name, chosen in re.findall(names, text):
        # A regexp's braces and quotes hold no labels.
        yield name, set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', chosen))


def expressions() -> list[str]:
    """All of the dashboard, as they are in its file."""
    panels = json.loads(FILE.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alert_expressions() -> str:
    """Without words that people read."""
    return re.sub(r"(?m)^ *(summary|description|runbook|- alert|- record|#).*$", "", RULES)


def test_the_dashboards_file_is_what_its_source_makes() -> None:
    assert FILE.read_text() == dashboard(), "run: python -m deploy.dashboard"


def test_every_panel_has_a_title_a_place_and_what_it_shows() -> None:
    content: dict[str, Any] = json.loads(FILE.read_text())
    panels = content["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(panels) == len(STATS) + sum(1 + len(charts) for _, charts in ROWS)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & places, f"{panel['title']} lies on another panel"
        places |= cells
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}"
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)


def test_every_metric_of_dashboard_and_rules_exists_with_its_labels() -> None:
    known = series()
    texts = [*expressions(), alert_expressions()]
    found = [pair for text in texts for pair in selectors(text)]
    assert len(found) > 60
    for name, labels in found:
        assert name in known, f"{name} is no metric"
        assert labels <= known[name] | EVERYWHERE, f"{name} has no {labels - known[name]}"


def test_what_is_grouped_by_is_a_label() -> None:
    made = {"process", "kind"}
    labels = set().union(*series().values()) | EVERYWHERE | made
    groups = [*expressions(), alert_expressions()]
    for text in groups:
        for listed in re.findall(r"\b(?:by|on|without) \(([^)]*)\)", text):
            assert set(re.split(r",\s*", listed)) <= labels, listed


def test_every_kind_of_series_is_on_the_dashboard() -> None:
    shown = {name for text in expressions() for name, _ in selectors(text)}
    for metric in METRICS:
        names = {metric.name, f"{metric.name}_bucket", f"{metric.name}_sum"}
        assert names & shown, f"no panel shows {metric.name}"


def test_probes_are_no_requests_and_predictions_are_known_by_their_routes() -> None:
    (probes,) = set(re.findall(r'route!~"([^"]*)"', RULES))
    (predicting,) = set(re.findall(r'route=~"([^"]*)"', RULES))
    assert f'route=~"{predicting}"' in PREDICT
    counted = [path for path in route_paths() if not re.fullmatch(probes, path)]
    ignored = set(route_paths()) - set(counted)
    assert {"/healthz", "/readyz", "/metrics"} <= ignored
    words = ("predict", "classify", "invocations", "infer")
    asks = {path for path in route_paths() if path == "/" or path.endswith(words)}
    assert {"/v1/predict", "/predict"} <= asks
    assert {path for path in route_paths() if re.fullmatch(predicting, path)} == asks
    assert not asks & ignored
    assert not [path for path in ignored if path.startswith("/v1/")]
