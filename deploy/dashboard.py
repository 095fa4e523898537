"""Builds the Grafana dashboard from `deploy.panels`: `python -m deploy.dashboard` writes it."""

from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders.common import StackingConfig, VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as Timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DynamicConfigValue,
    VariableOption,
    VariableRefresh,
)

from deploy.panels import ROWS, STATS, Chart, Query

FILE = Path(__file__).resolve().parent / "grafana" / "dashboards" / "id-spam.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24


def stat(title: str, unit: str, expression: str, text: str) -> Stat:
    panel = Stat().title(title).unit(unit).datasource(SOURCE).span(WIDTH // len(STATS)).height(4)
    panel = panel.color_mode(BigValueColorMode.NONE)
    if text:
        panel = panel.text_mode(BigValueTextMode.NAME)
    return panel.with_target(_target(Query(expression, text), "A"))


def panel(chart: Chart) -> Timeseries:
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST)
    legend = legend.placement(LegendPlacement.BOTTOM).show_legend(True)
    curves = Timeseries().title(chart.title).description(chart.note).unit(chart.unit)
    if not chart.signed:
        curves = curves.min(0)
    for name, colour in chart.colours.items():
        fixed = DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
        curves = curves.override_by_name(name, [fixed])
    curves = curves.datasource(SOURCE).span(WIDTH // 3).height(8).legend(legend)
    if chart.stacked:
        curves = curves.fill_opacity(20).stacking(StackingConfig().mode(StackingMode.NORMAL))
    for number, query in enumerate(chart.queries):
        curves = curves.with_target(_target(query, "ABCDE"[number]))
    return curves


def _target(query: Query, name: str) -> Dataquery:
    return Dataquery().expr(query.expression).legend_format(query.legend).ref_id(name).range()


def _label_variable(name: str, metric: str) -> QueryVariable:
    variable = QueryVariable(name).query(f"label_values({metric}, {name})").datasource(SOURCE)
    return (
        variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all"))
    )


def dashboard() -> str:
    """The JSON that Grafana reads."""
    board = (
        Dashboard("ID-SPAM")
        .uid("id-spam")
        .description("One frozen encoder, many adapters: docs/operate.md")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-30m", "now")
        .refresh("10s")
        .with_variable(DatasourceVariable("datasource").type("prometheus"))
        .with_variable(_label_variable("instance", "idspam_requests_total"))
        .with_variable(_label_variable("adapter", "idspam_predictions_total"))
    )
    number = count(1)
    for content in STATS:
        board = board.with_panel(stat(*content).id(next(number)))
    for title, charts in ROWS:
        board = board.with_row(Row(title).id(next(number)))
        for chart in charts:
            board = board.with_panel(panel(chart).id(next(number)))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(dashboard())
