"""The kinds of panel that the dashboards are made of, in one style; without metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import prometheus as queries
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
FULL_WIDTH = 24
Steps = Sequence[tuple[float | None, str]]
"""Colours from a value upwards; the first has no value."""


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and the name of its series in the legend."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class About:
    """A panel's title, description, and unit (by Grafana's name)."""

    title: str
    text: str
    unit: str = "short"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table of sites or streams. `steps` colour the cell."""

    title: str
    expr: str
    unit: str = "short"
    steps: Steps = ()
    decimals: int | None = None


def _target(query: Query, number: int, *, instant: bool, as_table: bool = False) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(SOURCE).expr(query.expr).ref_id(chr(ord("A") + number))
    target = target.instant() if instant else target.range()
    if query.legend:
        target.legend_format(query.legend)
    return target.format(queries.PromQueryFormat.TABLE if as_table else queries.PromQueryFormat.TIME_SERIES)


def _thresholds(steps: Steps) -> board.ThresholdsConfig:
    made = [Threshold(value=value, color=color) for value, color in steps]
    return board.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(made)


def graph(
    about: About, *shown: Query, span: int = 12, stacked: bool = False, top: float | None = None
) -> timeseries.Panel:
    """Lines over time; `stacked` where the sum means something. `top` is the axis' end."""
    panel = (
        timeseries.Panel()
        .title(about.title)
        .description(about.text)
        .unit(about.unit)
        .datasource(SOURCE)
        .span(span)
        .height(8)
        .min(0)
        .fill_opacity(25 if stacked else 8)
        .line_width(1)
        .show_points(shapes.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    if top is not None:
        panel.max(top)
    for number, query in enumerate(shown):
        panel.with_target(_target(query, number, instant=False))
    return panel


def figure(about: About, query: Query, *, span: int = 4, steps: Steps = ((None, "blue"),)) -> stat.Panel:
    """One number, large."""
    return (
        stat.Panel()
        .title(about.title)
        .description(about.text)
        .unit(about.unit)
        .datasource(SOURCE)
        .span(span)
        .height(4)
        .color_mode(shapes.BigValueColorMode.VALUE)
        .graph_mode(shapes.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(steps))
        .with_target(_target(query, 0, instant=True))
    )


def states(about: About, query: Query, *, span: int = 12) -> statetimeline.Panel:
    """Bands over time: 1 is green, 0 is red."""
    return (
        statetimeline.Panel()
        .title(about.title)
        .description(about.text)
        .datasource(SOURCE)
        .span(span)
        .height(8)
        .show_value(shapes.VisibilityMode.NEVER)
        .thresholds(_thresholds([(None, "red"), (1, "green")]))
        .with_target(_target(query, 0, instant=False))
    )


def rows(
    about: About,
    by: Mapping[str, str],
    columns: Sequence[Column],
    *,
    worst: str,
    at_most: int,
    link: tuple[str, str] | None = None,
) -> table.Panel:
    """A table with a row for each value of the labels `by` (name and heading), the worst first.

    `worst` is the heading of the column that is sorted by, downwards. `link` is a title and an URL, for the
    first label's cells.
    """
    panel = (
        table.Panel()
        .title(about.title)
        .description(about.text)
        .datasource(SOURCE)
        .span(FULL_WIDTH)
        .height(10)
    )
    renamed = dict(by)
    for number, column in enumerate(columns):
        panel.with_target(_target(Query(column.expr), number, instant=True, as_table=True))
        # With one query Grafana calls the value so; with several, each by its letter.
        value = f"Value #{chr(ord('A') + number)}" if len(columns) > 1 else "Value"
        renamed[value] = column.title
        panel.override_by_name(column.title, _looks(column))
    if link:
        links = [{"title": link[0], "url": link[1]}]
        panel.override_by_name(next(iter(by.values())), [DynamicConfigValue("links", links)])
    order = {name: number for number, name in enumerate(renamed)}
    steps: list[tuple[str, object]] = [
        ("merge", {}),
        ("organize", {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": renamed}),
        ("sortBy", {"fields": {}, "sort": [{"field": worst, "desc": True}]}),
        ("limit", {"limitField": at_most}),
    ]
    for name, options in steps:
        panel.with_transformation(DataTransformerConfig(id_val=name, options=options))
    return panel


def _looks(column: Column) -> list[DynamicConfigValue]:
    looks = [DynamicConfigValue("unit", column.unit)]
    if column.decimals is not None:
        looks.append(DynamicConfigValue("decimals", column.decimals))
    if column.steps:
        steps = [{"value": value, "color": color} for value, color in column.steps]
        looks.append(DynamicConfigValue("thresholds", {"mode": "absolute", "steps": steps}))
        looks.append(DynamicConfigValue("custom.cellOptions", {"type": "color-background", "mode": "basic"}))
    return looks


def dashboard(uid: str, title: str, text: str, *, every_site: bool) -> board.Dashboard:
    """An empty dashboard with its variables: the data source, and one site or any number of them."""
    sites = (
        board.QueryVariable("site")
        .label("Site")
        .datasource(SOURCE)
        .query({"query": "label_values(gup_build_info, site)", "refId": "sites"})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )
    if every_site:
        everything = VariableOption(selected=True, text="All", value="$__all")
        sites.multi(True).include_all(True).all_value(".*").current(everything)
    return (
        board.Dashboard(title)
        .uid(uid)
        .description(text)
        .tags(["gup"])
        .timezone("browser")
        .refresh("1m")
        .time("now-24h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(board.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(sites)
    )
