"""The dashboard *Site*: one gup, from savings to alerts."""

from grafana_foundation_sdk.builders import dashboard as board

from gup_dashboards.panels import About, Column, Query, dashboard, figure, graph, rows, states

_SITE = 'site="$site"'
_GOOD_SHARE = ((None, "red"), (0.5, "orange"), (0.8, "green"))
_NONE_IS_GOOD = ((None, "green"), (1, "red"))
_RATE = "$__rate_interval"
_FILLS = "30m"
"""Fills are few: their percentiles need a longer window than rates of bytes."""


def _increase(metric: str, window: str, more: str = "") -> str:
    return f"sum(increase({metric}{{{_SITE}{more}}}[{window}]))"


def _saved(window: str) -> str:
    sent, received = "gup_client_sent_bytes_total", "gup_upstream_received_bytes_total"
    return f"{_increase(sent, window)} - {_increase(received, window)}"


def _byte_share(window: str) -> str:
    sent, received = "gup_client_sent_bytes_total", "gup_upstream_received_bytes_total"
    return f"1 - {_increase(received, window)} / {_increase(sent, window)}"


def _request_share(window: str) -> str:
    from_store = _increase("gup_requests_total", window, ', result=~"hit|revalidated|stale"')
    content = _increase("gup_requests_total", window, ', result!~"refused|error"')
    return f"{from_store} / {content}"


def _quantile(quantile: float, histogram: str, window: str, by: str = "") -> str:
    labels = ", ".join(["le", by] if by else ["le"])
    rate = f"sum by ({labels}) (rate({histogram}_bucket{{{_SITE}}}[{window}]))"
    return f"histogram_quantile({quantile}, {rate})"


def site() -> board.Dashboard:
    """Saved, served, fetched, and alerts."""
    made = dashboard("gup-site", "gup: Site", "One site's Group Update Provider.", every_site=False)
    for section in (_savings, _traffic, _fills, _content, _health, _cluster):
        section(made)
    return made


def _savings(made: board.Dashboard) -> None:
    saved = "Sent to clients minus received from upstream; below zero when more was fetched than sent."
    made.with_row(board.Row("Savings"))
    made.with_panel(figure(About("Saved, in the range", saved, "decbytes"), Query(_saved("$__range"))))
    made.with_panel(figure(About("Saved, 30 days", saved, "decbytes"), Query(_saved("30d"))))
    made.with_panel(
        figure(
            About("Byte hit ratio", "Share of the sent bytes that did not cross the WAN.", "percentunit"),
            Query(_byte_share("$__range")),
            steps=_GOOD_SHARE,
        )
    )
    made.with_panel(
        figure(
            About("Request hit ratio", "Share of requests answered from the store.", "percentunit"),
            Query(_request_share("$__range")),
            steps=_GOOD_SHARE,
        )
    )
    waiting = f'sum(increase(gup_requests_total{{{_SITE}, result=~"miss|collapsed"}}[$__range]))'
    fills = f"sum(increase(gup_fills_total{{{_SITE}}}[$__range]))"
    made.with_panel(
        figure(
            About("Clients per fill", "Requests answered by one fetch while it ran."),
            Query(f"{waiting} / {fills}"),
        )
    )
    made.with_panel(
        figure(
            About("Clients in a day", "Client addresses seen within 24 hours."),
            Query(f'sum(gup_clients_seen{{{_SITE}, window="1d"}})'),
        )
    )


def _traffic(made: board.Dashboard) -> None:
    made.with_row(board.Row("Traffic"))
    made.with_panel(
        graph(
            About("To clients, by source", "cache: the store; fill: while it arrives; bypass.", "Bps"),
            Query(f"sum by (source) (rate(gup_client_sent_bytes_total{{{_SITE}}}[{_RATE}]))", "{{source}}"),
            stacked=True,
        )
    )
    received = f"rate(gup_upstream_received_bytes_total{{{_SITE}}}[{_RATE}])"
    limit = f'sum(gup_bandwidth_limit_bytes_per_second{{{_SITE}, direction="upstream"}})'
    made.with_panel(
        graph(
            About(
                "WAN against its limit", "From upstream, by purpose; the limit in force (wan.rate).", "Bps"
            ),
            Query(f"sum by (purpose) ({received})", "{{purpose}}"),
            Query(limit, "limit"),
        )
    )
    made.with_panel(
        graph(
            About(
                "Budget of the WAN", "The site's in this period (wan.budget), used, and held back.", "bytes"
            ),
            Query(f"max(gup_wan_budget_used_bytes{{{_SITE}}})", "used"),
            Query(f"max(gup_wan_budget_bytes{{{_SITE}}})", "budget"),
        )
    )
    made.with_panel(
        graph(
            About("Held back by the budget", "Fills an hour, by class; 1 of outbreak: it is open.", "none"),
            Query(f"sum by (class) (increase(gup_wan_budget_held_back_total{{{_SITE}}}[1h]))", "{{class}}"),
            Query(f"max(gup_outbreak{{{_SITE}}})", "outbreak"),
        )
    )
    made.with_panel(
        graph(
            About("Requests by result", "The result of each request.", "reqps"),
            Query(f"sum by (result) (rate(gup_requests_total{{{_SITE}}}[{_RATE}]))", "{{result}}"),
            stacked=True,
        )
    )
    made.with_panel(
        graph(
            About("Clients", "Open connections, downloads under way and waiting, addresses seen in an hour."),
            Query(f"sum(gup_client_connections{{{_SITE}}})", "connections"),
            Query(f"sum(gup_client_downloads_in_progress{{{_SITE}}})", "downloads"),
            Query(f"sum(gup_client_downloads_queued{{{_SITE}}})", "waiting for a download"),
            Query(f'sum(gup_clients_seen{{{_SITE}, window="1h"}})', "seen in an hour"),
        )
    )
    made.with_panel(
        graph(
            About(
                "Clients by age of their revision",
                "Active within 7 days, by their oldest revision taken or stated. Taken is not installed.",
            ),
            Query(f"sum by (age) (gup_clients_by_age{{{_SITE}}})", "{{age}}"),
            stacked=True,
        )
    )


def _fills(made: board.Dashboard) -> None:
    first_byte, duration = "gup_time_to_first_byte_seconds", "gup_fill_duration_seconds"
    made.with_row(board.Row("Fills and waiting"))
    made.with_panel(
        graph(
            About("Fills and waiters", "Fetches under way, and the requests attached to them."),
            Query(f"sum(gup_fills_in_progress{{{_SITE}}})", "fills"),
            Query(f"sum(gup_fill_waiters{{{_SITE}}})", "waiters"),
            span=8,
        )
    )
    made.with_panel(
        graph(
            About("Time to first byte", "From request to first byte; without hits of the hot cache.", "s"),
            *(
                Query(_quantile(q, first_byte, _FILLS, "result"), f"{{{{result}}}} p{round(q * 100)}")
                for q in (0.5, 0.95)
            ),
            span=8,
        )
    )
    made.with_panel(
        graph(
            About("Duration of fills", "From claim to commit.", "s"),
            *(Query(_quantile(q, duration, _FILLS), f"p{round(q * 100)}") for q in (0.5, 0.95, 0.99)),
            span=8,
        )
    )
    for title, text, metric in (
        ("Where the seconds of fills went", "Seconds of waiting in a second.", "gup_fill_phase_seconds"),
        (
            "Where the seconds of slow requests went",
            "The same of requests that took longer than reports.slow.",
            "gup_request_phase_seconds",
        ),
    ):
        spent = f"sum by (phase) (rate({metric}_sum{{{_SITE}}}[{_FILLS}]))"
        made.with_panel(graph(About(title, text, "s"), Query(spent, "{{phase}}"), stacked=True))


def _content(made: board.Dashboard) -> None:
    made.with_row(board.Row("Content"))
    for title, way in (
        ("Full against delta, to clients", "sent"),
        ("Full against delta, over WAN", "received"),
    ):
        rate = f"sum by (kind) (rate(gup_stream_{way}_bytes_total{{{_SITE}}}[{_RATE}]))"
        made.with_panel(
            graph(
                About(title, "Many full packages where deltas exist are a storm.", "Bps"),
                Query(rate, "{{kind}}"),
                stacked=True,
            )
        )
    newest = f"max by (product, language) (gup_newest_content_timestamp_seconds{{{_SITE}, where="
    sent = "sum by (product, language) (increase(gup_stream_{}_bytes_total{{{}}}[$__range]))"
    made.with_panel(
        rows(
            About("Streams", "Age of the newest revision, by day; bytes in the range; storms."),
            {"product": "Product", "language": "Language"},
            [
                Column(
                    "Newest held", f'time() - {newest}"held"}})', "s", ((None, "green"), (345600, "orange"))
                ),
                Column("Newest asked for", f'time() - {newest}"requested"}})', "s"),
                Column("Sent", sent.format("sent", _SITE), "decbytes"),
                Column("Received", sent.format("received", _SITE), "decbytes"),
                Column(
                    "Full storm",
                    f"max by (product, language) (gup_full_storm{{{_SITE}}})",
                    steps=_NONE_IS_GOOD,
                ),
            ],
            worst="Newest held",
            at_most=50,
        )
    )


def _health(made: board.Dashboard) -> None:
    made.with_row(board.Row("Health"))
    made.with_panel(
        graph(
            About("Disk", "Stored against cache.max_size, and what is free on the file system.", "decbytes"),
            Query(f"sum(gup_cache_size_bytes{{{_SITE}}})", "stored"),
            Query(f"sum(gup_cache_limit_bytes{{{_SITE}}})", "limit"),
            Query(f"min(gup_disk_free_bytes{{{_SITE}}})", "free"),
            span=8,
        )
    )
    made.with_panel(
        graph(
            About("Days kept", "Bytes stored, over bytes received in a day: how long content stays.", "d"),
            Query('site:gup_content_kept:days{site="$site"}', "days"),
            span=8,
        )
    )
    made.with_panel(
        graph(
            About("Evicted", "By reason.", "Bps"),
            Query(f"sum by (reason) (rate(gup_evicted_bytes_total{{{_SITE}}}[{_RATE}]))", "{{reason}}"),
            span=8,
            stacked=True,
        )
    )
    made.with_panel(
        states(
            About("Upstreams", "Green while content is requested from it."),
            Query(f"max by (upstream) (gup_upstream_up{{{_SITE}}})", "{{upstream}}"),
        )
    )
    outcomes = f"sum by (upstream, outcome) (rate(gup_upstream_requests_total{{{_SITE}}}[{_RATE}]))"
    made.with_panel(
        graph(
            About("Requests to upstream", "By outcome.", "reqps"),
            Query(outcomes, "{{upstream}} {{outcome}}"),
        )
    )
    errors = f'rate(gup_requests_total{{{_SITE}, result=~"error|refused"}}[{_RATE}])'
    made.with_panel(
        graph(
            About("Errors and refusals", "By status code.", "reqps"),
            Query(f"sum by (result, code) ({errors})", "{{result}} {{code}}"),
            span=8,
            stacked=True,
        )
    )
    made.with_panel(
        graph(
            About("Fills that ended", "And the bytes of them that were discarded.", "short"),
            Query(f"sum by (outcome) (increase(gup_fills_total{{{_SITE}}}[{_RATE}]))", "{{outcome}}"),
            Query(
                f"sum by (reason) (increase(gup_fill_resumes_total{{{_SITE}}}[{_RATE}]))",
                "resumed: {{reason}}",
            ),
            span=8,
        )
    )
    made.with_panel(
        figure(
            About("Integrity failures, in the range", "Damage found in the store; gup repairs it."),
            Query(_increase("gup_integrity_failures_total", "$__range")),
            steps=_NONE_IS_GOOD,
        )
    )
    made.with_panel(
        figure(
            About("Worker restarts, in the range", "Workers that died and were replaced."),
            Query(_increase("gup_worker_restarts_total", "$__range")),
            steps=_NONE_IS_GOOD,
        )
    )
    made.with_panel(
        rows(
            About("Alerts", "Alerts that fire for this site."),
            {"alertname": "Alert", "severity": "Severity", "alertstate": "State", "product": "Product"},
            [
                Column(
                    "Weight",
                    "sum by (alertname, severity, alertstate, product) ("
                    '10 * ALERTS{alertname=~"Gup.+", site="$site", severity="critical"}'
                    ' or ALERTS{alertname=~"Gup.+", site="$site", severity="warning"})',
                )
            ],
            worst="Weight",
            at_most=50,
        )
    )


def _cluster(made: board.Dashboard) -> None:
    received, sent = (f"rate(gup_peer_{way}_bytes_total{{{_SITE}}}[{_RATE}])" for way in ("received", "sent"))
    wan = f"rate(gup_upstream_received_bytes_total{{{_SITE}}}[{_RATE}])"
    clients = f"rate(gup_client_sent_bytes_total{{{_SITE}}}[{_RATE}])"
    made.with_row(board.Row("Cluster"))
    made.with_panel(
        graph(
            About("Members", "How many gups each one counts, itself among them; empty without [cluster]."),
            Query(f"max by (instance) (gup_cluster_members{{{_SITE}}})", "{{instance}}"),
            span=8,
        )
    )
    made.with_panel(
        graph(
            About(
                "Between members",
                "Body bytes that members sent each other; they did not cross the WAN.",
                "Bps",
            ),
            Query(f"sum by (instance) ({received})", "{{instance}} received"),
            Query(f"sum by (instance) ({sent})", "{{instance}} sent"),
            span=8,
        )
    )
    made.with_panel(
        graph(
            About("Each gup's part", "What each sent to clients, and fetched over the WAN.", "Bps"),
            Query(f"sum by (instance) ({clients})", "{{instance}} to clients"),
            Query(f"sum by (instance) ({wan})", "{{instance}} from upstream"),
            span=8,
        )
    )
