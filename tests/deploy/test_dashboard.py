"""The dashboard and the alert rules use only metrics, labels and routes that exist."""

import json
import re
from typing import Any

from prometheus_client import Histogram

from deploy.dashboard import FILE, dashboard
from deploy.panels import PREDICT, ROWS, STATS
from service.http.app import route_paths
from service.observability.metrics import METRICS
from tests.support.promql import DASHBOARD, RULES, alert_expressions, panel_expressions, selectors

# Series of Prometheus itself, and of its Python library's process collector.
FOREIGN = {
    "up": set[str](),
    "process_resident_memory_bytes": set[str](),
    "process_cpu_seconds_total": set[str](),
    "process_start_time_seconds": set[str](),
}
EVERYWHERE = {"instance", "job"}


def series() -> dict[str, set[str]]:
    """Every series that Prometheus has of the service, with its labels."""
    labels_by_series = dict(FOREIGN)
    for metric in METRICS:
        if metric.kind is Histogram:
            labels_by_series[f"{metric.name}_bucket"] = {*metric.labels, "le"}
            for part in ("sum", "count"):
                labels_by_series[f"{metric.name}_{part}"] = set(metric.labels)
        else:
            labels_by_series[metric.name] = set(metric.labels)
    return labels_by_series


def test_the_dashboards_file_is_what_its_source_makes() -> None:
    assert DASHBOARD == FILE
    assert FILE.read_text() == dashboard(), "run: python -m deploy.dashboard"


def test_every_panel_has_a_title_a_place_of_its_own_and_a_query() -> None:
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
    texts = [*panel_expressions(), alert_expressions()]
    selected = [pair for text in texts for pair in selectors(text)]
    assert len(selected) > 60
    for name, labels in selected:
        assert name in known, f"{name} is not a metric"
        assert labels <= known[name] | EVERYWHERE, f"{name} has no {labels - known[name]}"


def test_everything_that_is_grouped_by_is_a_label() -> None:
    made_by_rules = {"process", "kind"}
    labels = set().union(*series().values()) | EVERYWHERE | made_by_rules
    for text in [*panel_expressions(), alert_expressions()]:
        for listed in re.findall(r"\b(?:by|on|without) \(([^)]*)\)", text):
            assert set(re.split(r",\s*", listed)) <= labels, listed


def test_every_kind_of_series_is_on_the_dashboard() -> None:
    shown = {name for text in panel_expressions() for name, _ in selectors(text)}
    for metric in METRICS:
        names = {metric.name, f"{metric.name}_bucket", f"{metric.name}_sum"}
        assert names & shown, f"no panel shows {metric.name}"


def test_probes_do_not_count_as_requests_and_predictions_are_told_by_their_routes() -> None:
    (probes,) = set(re.findall(r'route!~"([^"]*)"', RULES))
    (predicting,) = set(re.findall(r'route=~"([^"]*)"', RULES))
    assert f'route=~"{predicting}"' in PREDICT
    counted = [path for path in route_paths() if not re.fullmatch(probes, path)]
    ignored = set(route_paths()) - set(counted)
    assert {"/healthz", "/readyz", "/metrics"} <= ignored
    words = ("predict", "classify", "invocations", "infer", "rerank", "embed", "embeddings")
    predict_paths = {path for path in route_paths() if path == "/" or path.endswith(words)}
    assert {"/v1/predict", "/predict"} <= predict_paths
    assert {path for path in route_paths() if re.fullmatch(predicting, path)} == predict_paths
    assert not predict_paths & ignored
    assert not [path for path in ignored if path.startswith("/v1/")]
