"""The dashboard *Fleet*: hundreds of sites at once, and which of them need attention."""

from grafana_foundation_sdk.builders import dashboard as board

from gup_dashboards.panels import About, Column, Query, dashboard, figure, graph, rows

_SITE = 'site=~"$site"'
_FIRING = f'ALERTS{{alertname=~"Gup.+", alertstate="firing", {_SITE}}}'
_GOOD_SHARE = ((None, "red"), (0.5, "orange"), (0.8, "green"))
_NONE_IS_GOOD = ((None, "green"), (1, "orange"), (10, "red"))
_SENT, _RECEIVED = "site:gup_client_sent_bytes:sum", "site:gup_upstream_received_bytes:sum"


def _increase(rule: str, window: str) -> str:
    return f"increase({rule}{{{_SITE}}}[{window}])"


def _of_site(rule: str) -> str:
    """One row a site: without the rule's name, by which a table would not join it with the others."""
    return f"max by (site) ({rule}{{{_SITE}}})"


def fleet() -> board.Dashboard:
    """All sites together, then the worst of them. Reads recording rules: one series a site."""
    made = dashboard("gup-fleet", "gup: Fleet", "All sites' Group Update Providers.", every_site=True)
    for section in (_totals, _worst, _traffic, _outliers):
        section(made)
    return made


def _totals(made: board.Dashboard) -> None:
    made.with_row(board.Row("All sites"))
    made.with_panel(
        figure(
            About("Sites that answer", "Of the targets that Prometheus has."),
            Query(f'sum(max by (site) (up{{job="gup", {_SITE}}}))'),
            span=3,
        )
    )
    made.with_panel(
        figure(
            About("Sites that do not", "Their clients bypass gup and use the WAN."),
            Query(f'sum(1 - max by (site) (up{{job="gup", {_SITE}}}))'),
            span=3,
            steps=((None, "green"), (1, "red")),
        )
    )
    for title, window in (("Saved, in the range", "$__range"), ("Saved, 30 days", "30d")):
        saved = f"sum({_increase(_SENT, window)}) - sum({_increase(_RECEIVED, window)})"
        made.with_panel(
            figure(About(title, "Sent to clients minus received from upstream.", "decbytes"), Query(saved))
        )
    share = f"1 - sum({_increase(_RECEIVED, '$__range')}) / sum({_increase(_SENT, '$__range')})"
    made.with_panel(
        figure(
            About("Byte hit ratio", "Share of the sent bytes that did not cross a WAN.", "percentunit"),
            Query(share),
            steps=_GOOD_SHARE,
        )
    )
    made.with_panel(
        figure(
            About("Clients in a day", "Client addresses seen within 24 hours."),
            Query(f"sum(site:gup_clients_seen_1d:sum{{{_SITE}}})"),
            span=3,
        )
    )
    made.with_panel(
        figure(
            About("Alerts firing", "The table shows at which sites."),
            Query(f"count({_FIRING}) or vector(0)"),
            span=3,
            steps=_NONE_IS_GOOD,
        )
    )


def _worst(made: board.Dashboard) -> None:
    high_is_bad = ((None, "green"), (0.01, "orange"), (0.05, "red"))
    week = (
        f"site:gup_clients_seen_1d:sum{{{_SITE}}} / (site:gup_clients_seen_1d:sum{{{_SITE}}} offset 1w > 0)"
    )
    columns = [
        Column("Trouble", _of_site("site:gup_trouble:sum"), steps=_NONE_IS_GOOD),
        Column("Up", f'max by (site) (up{{job="gup", {_SITE}}})', steps=((None, "red"), (1, "green"))),
        Column("Upstreams up", _of_site("site:gup_upstreams_up:ratio"), "percentunit", _GOOD_SHARE, 0),
        Column("Byte hit ratio", _of_site("site:gup_byte_hit_ratio:rate1d"), "percentunit", _GOOD_SHARE, 0),
        Column("Request hit ratio", _of_site("site:gup_request_hit_ratio:rate1d"), "percentunit", (), 0),
        Column("Saved", _of_site("site:gup_saved_bytes:increase1d"), "decbytes", (), 1),
        Column("Errors", _of_site("site:gup_errors:ratio5m"), "percentunit", high_is_bad, 1),
        Column("WAN used", _of_site("site:gup_wan_utilisation:ratio"), "percentunit", (), 0),
        Column("Disk free", f"min by (site) (gup_disk_free_bytes{{{_SITE}}})", "decbytes", (), 1),
        Column("Days kept", _of_site("site:gup_content_kept:days"), "d", (), 1),
        Column("Clients", _of_site("site:gup_clients_seen_1d:sum")),
        Column("Clients, of a week ago", week, "percentunit", (), 0),
    ]
    made.with_row(board.Row("The worst sites"))
    made.with_panel(
        rows(
            About(
                "The worst sites",
                "Trouble: a critical alert counts ten, a warning one. Other figures are of a day.",
            ),
            {"site": "Site"},
            columns,
            worst="Trouble",
            at_most=50,
            link=("Open this site", "/d/gup-site?var-site=${__data.fields.Site}"),
        )
    )


def _traffic(made: board.Dashboard) -> None:
    made.with_row(board.Row("Traffic of all sites"))
    made.with_panel(
        graph(
            About("To clients, and over the WAN", "The gap between the two is the saving.", "Bps"),
            Query(f"sum(site:gup_client_sent_bytes:rate5m{{{_SITE}}})", "to clients"),
            Query(f"sum(site:gup_upstream_received_bytes:rate5m{{{_SITE}}})", "over the WAN"),
        )
    )
    made.with_panel(
        graph(
            About("Requests by result", "Of all sites.", "reqps"),
            Query(f"sum by (result) (site_result:gup_requests:rate5m{{{_SITE}}})", "{{result}}"),
            stacked=True,
        )
    )


def _outliers(made: board.Dashboard) -> None:
    made.with_row(board.Row("Who stands out"))
    made.with_panel(
        graph(
            About("Lowest byte hit ratios", "Ten sites, over a day.", "percentunit"),
            Query(f"bottomk(10, site:gup_byte_hit_ratio:rate1d{{{_SITE}}})", "{{site}}"),
        )
    )
    made.with_panel(
        graph(
            About("Fullest WAN links", "Ten sites; 1 is the site's whole rate.", "percentunit"),
            Query(f"topk(10, site:gup_wan_utilisation:ratio{{{_SITE}}})", "{{site}}"),
        )
    )
    made.with_panel(
        graph(
            About("Most errors", "Ten sites, of all responses except refusals.", "percentunit"),
            Query(f"topk(10, site:gup_errors:ratio5m{{{_SITE}}})", "{{site}}"),
        )
    )
    made.with_panel(
        graph(
            About("Sites with a full storm, a dead upstream, damage", "How many at once."),
            Query(f"count(max by (site) (gup_full_storm{{{_SITE}}}) > 0) or vector(0)", "full storm"),
            Query(f"count(min by (site) (gup_upstream_up{{{_SITE}}}) == 0) or vector(0)", "upstream down"),
            Query(
                f"count(sum by (site) (increase(gup_integrity_failures_total{{{_SITE}}}[1h])) > 0)"
                " or vector(0)",
                "damage in the last hour",
            ),
        )
    )
    made.with_panel(
        rows(
            About(
                "Oldest content", "Streams whose newest revision is furthest behind the newest of any site."
            ),
            {"site": "Site", "product": "Product", "language": "Language"},
            [
                Column(
                    "Behind",
                    "max by (product, language) (site_product:gup_newest_content_timestamp_seconds:max)"
                    " - on (product, language) group_right ()"
                    f" site_product:gup_newest_content_timestamp_seconds:max{{{_SITE}}}",
                    "s",
                    ((None, "green"), (172800, "orange")),
                )
            ],
            worst="Behind",
            at_most=50,
        )
    )
    made.with_panel(
        graph(
            About("Versions", "How many sites run which gup."),
            Query(f"count by (version) (gup_build_info{{{_SITE}}})", "{{version}}"),
            span=24,
            stacked=True,
        )
    )
