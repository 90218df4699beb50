import io

import pytest
from rich.console import Console

from gup.content.key import Kind
from gup.demo.clients import Figures
from gup.demo.content import Counts, FileCounts
from gup.demo.screen import (
    Herd,
    OwnFigures,
    Plain,
    Progress,
    Terminal,
    milliseconds,
    own_figures,
    print_summary,
    summarise,
    summary_rows,
)

METRICS = """# HELP gup_upstream_received_bytes_total Body bytes received from upstream.
# TYPE gup_upstream_received_bytes_total counter
gup_upstream_received_bytes_total{purpose="fill",upstream="127.0.0.1:8014"} 1.5e+03
gup_upstream_received_bytes_total{purpose="index",upstream="127.0.0.1:8014"} 100.0
gup_client_sent_bytes_total{source="cache"} 9000.0
gup_client_sent_bytes_total{source="fill"} 1000.0
gup_fills_total{outcome="committed"} 3.0
gup_fills_total{outcome="failed"} 7.0
gup_client_sent_bytes_total_created 1.0
"""
OWN = OwnFigures(1600, 10_000, 3)


def row(fetches, kind=Kind.DELTA, not_modified=0):
    return FileCounts(kind, 100, fetches, not_modified, 0, 100 * fetches)


def figures(**changes):
    made = Figures(requests=50, received_bytes=9900)
    made.downloads.update({Kind.DELTA: 40, Kind.FULL: 2})
    made.answered(0.01, "gup; hit")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def counts(*rows, sent_bytes=1600, again=0):
    return Counts(10, 0, sent_bytes, 0, 4, again, {str(at): row for at, row in enumerate(rows)})


def summary(made=None, seen=None, own=OWN, herd=None):
    seen = seen or counts(row(1), row(1), row(0), row(3, Kind.INDEX, 2))
    return summarise(made or figures(), seen, own, clients=5, seconds=30.0, herd=herd)


def test_own_figures_are_read_from_the_exposition():
    assert own_figures(METRICS) == OWN
    assert own_figures("") == OwnFigures(0, 0, 0)


def test_a_right_run_adds_up():
    made = summary()
    assert made.status == 0
    assert made.saved_bytes == 8300
    assert made.saved_share == pytest.approx(8300 / 9900)
    assert (made.files_fetched, made.fetches_per_file_max, made.files_fetched_twice) == (2, 1, 0)
    assert (made.index_fetches, made.index_not_modified) == (3, 2)


@pytest.mark.parametrize(
    ("made", "status"),
    [
        (summary(figures(wrong=1)), 1),
        (summary(figures(failed=1)), 1),
        (summary(Figures()), 1),
        (summary(seen=counts(row(2), row(1))), 2),
        (summary(seen=counts(row(1), again=1)), 2),
        (summary(figures(wrong=1), counts(row(2))), 1),
        (summary(own=None), 4),
        (summary(own=OwnFigures(1601, 10_000, 3)), 4),
        (summary(own=OwnFigures(1600, 9899, 3)), 4),
        (summary(seen=counts(row(1), sent_bytes=1599)), 4),
    ],
)
def test_the_verdict(made, status):
    assert made.status == status
    assert made.document()["status"] == status


def test_saving_nothing_is_not_hidden():
    assert summary(seen=counts(row(1), sent_bytes=20_000)).saved_bytes == -10_100


def printed(made):
    out = io.StringIO()
    print_summary(Console(file=out, width=160), made)
    return out.getvalue()


def test_the_summary_is_readable():
    text = printed(summary(herd=Herd(5, 40, 1.5, 8_000_000, 1000)))
    for words in ("9.9 kB", "1.6 kB", "83.8%", "they agree", "all right", "40 downloads in 1.5 s", "10 ms"):
        assert words in text


def test_what_went_wrong_is_readable():
    text = printed(summary(figures(wrong=2, failed=1, complaints=["[b]/content/x: other bytes"]), own=None))
    for words in ("2 bodies WRONG, 1 downloads FAILED", "not available", "[b]/content/x: other bytes"):
        assert words in text
    assert ("bytes compared", "NOTHING was received") in summary_rows(summary(Figures()))


def progress(seconds):
    return Progress(seconds, 30.0, figures(), 1000, 500.0)


def test_plain_lines_come_every_two_seconds():
    out = io.StringIO()
    screen = Plain(Console(file=out, width=80))
    with screen:
        for tenth in range(45):
            screen.show(progress(tenth / 10))
        screen.note("something happened")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert "over the WAN: 1.0 kB, now 500 B/s" in lines[0]
    assert lines[-1] == "something happened"


def test_the_terminal_shows_a_table_and_cleans_up():
    out = io.StringIO()
    with Terminal(Console(file=out, width=100, force_terminal=True)) as screen:
        screen.show(progress(3.0))
        screen.note("something happened")
    text = out.getvalue()
    assert "clients got" in text
    assert "something happened" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_milliseconds_are_for_people():
    assert milliseconds(None) == "none"
