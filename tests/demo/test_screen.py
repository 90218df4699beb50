"""The verdict of a run, and how it is shown."""

import io

import pytest
from rich.console import Console

from gup.content.key import Kind
from gup.demo.clients import Figures
from gup.demo.manager import Counts, FileCounts
from gup.demo.screen import Summary, milliseconds, print_summary, progress, summary_rows


def totals(received, sent):
    return {"upstream_received_bytes": received, "client_sent_bytes": sent}


OWN = totals(1600, 10_000)


def row(fetches, kind=Kind.DELTA, not_modified=0):
    return FileCounts(kind, 100, fetches, not_modified, 100 * fetches)


def figures(**changes):
    made = Figures(requests=50, received_bytes=9900)
    made.downloads.update({Kind.DELTA: 40, Kind.FULL: 2})
    made.answered(0.01, "gup; hit")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def counts(*rows, sent_bytes=1600, refetched=0):
    return Counts(10, 0, sent_bytes, 0, refetched, {str(at): row for at, row in enumerate(rows)})


def summary(made=None, seen=None, own=OWN, seconds=30.0):
    seen = seen or counts(row(1), row(1), row(0), row(3, Kind.INDEX, 2))
    return Summary(made or figures(), seen, 5, seconds, own)


def test_a_right_run_adds_up():
    told = summary().document()
    assert (told["status"], told["saved_bytes"]) == (0, 8300)
    assert told["saved_share"] == pytest.approx(8300 / 9900)
    assert (told["files_fetched"], told["fetches_per_file_max"], told["files_fetched_twice"]) == (2, 1, 0)
    assert (told["index_fetches"], told["index_not_modified"]) == (3, 2)


@pytest.mark.parametrize(
    ("made", "status"),
    [
        (summary(figures(wrong=1)), 1),
        (summary(figures(failed=1)), 1),
        (summary(Figures()), 1),
        (summary(seen=counts(row(1), refetched=1)), 2),
        (summary(figures(wrong=1), counts(row(2), refetched=1)), 1),
        (summary(own=None), 4),
        (summary(own=totals(1601, 10_000)), 4),
        (summary(own=totals(1600, 9899)), 4),
        (summary(seen=counts(row(1), sent_bytes=1599)), 4),
    ],
)
def test_the_verdict(made, status):
    assert made.status == made.document()["status"] == status


def test_saving_nothing_is_not_hidden():
    assert summary(seen=counts(row(1), sent_bytes=20_000)).document()["saved_bytes"] == -10_100


def printed(made):
    out = io.StringIO()
    print_summary(Console(file=out, width=160), made)
    return out.getvalue()


def test_the_summary_is_readable():
    text = printed(summary())
    for words in ("9.9 kB", "1.6 kB", "83.8%", "they agree", "all right", "9.91 ms"):
        assert words in text


def test_what_went_wrong_is_readable():
    text = printed(summary(figures(wrong=2, failed=1, complaints=["[b]/content/x: other bytes"]), own=None))
    for words in ("2 bodies WRONG, 1 downloads FAILED", "not available", "[b]/content/x: other bytes"):
        assert words in text
    assert ("bytes compared", "NOTHING was received") in summary_rows(summary(Figures()))


def test_progress_is_a_table_whose_lines_hold_one_thing_each():
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system=None).print(
        progress(summary(seconds=3.0), 30.0)
    )
    lines = out.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1, "the bar stands within the table"
    assert ["time" in line for line in lines if "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in line] == [True]
    assert any("over the WAN" in line for line in lines)


def test_milliseconds_are_for_people():
    assert milliseconds(None) == "none"
    assert milliseconds(2.0812) == "2.08 s"
