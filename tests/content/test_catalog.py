"""ContentInfo.txt, as managers write it and as it may arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.catalog import parse_catalog, respelled

MONIKER = "{535CB6A4-441F-4e8a-A897-804CD859100E}"
LINE = f"{MONIKER}: SEPC Virus Definitions Win32 12.1 RU6 - MicroDefsB.CurDefs - SymAllLanguages"


@pytest.mark.parametrize(
    "text",
    [
        LINE.encode(),
        b"\xef\xbb\xbf" + LINE.encode() + b"\r\n",
        (LINE + "\r\n").encode("utf-16"),
        b"\r\n# a remark\r\nnot a line at all\r\n" + LINE.encode() + b"\r\n\r\n",
        f"  {MONIKER} : {LINE.split(': ')[1]}  ".encode(),
    ],
)
def test_a_line_is_found_however_it_is_written(text):
    (row,) = parse_catalog(text).values()
    assert row.moniker == MONIKER
    assert row.product == "SEPC Virus Definitions Win32 12.1 RU6"
    assert row.all_languages


def test_languages_and_short_lines():
    rows = parse_catalog(f"{MONIKER}: Client Patch - Patch - French\n{MONIKER[:-3]}0E}}: x\n".encode())
    assert rows[MONIKER.upper()].product == "x"
    rows = parse_catalog(f"{MONIKER}: Client Patch - Patch - French\n".encode())
    assert rows[MONIKER.upper()].language == "French"
    assert not rows[MONIKER.upper()].all_languages


@given(st.binary(max_size=400))
def test_no_text_breaks_it(text):
    parse_catalog(text)


def test_a_path_is_respelled_only_where_that_changes_something():
    encoded = "%7B535CB6A4-441F-4e8a-A897-804CD859100E%7D"
    assert respelled(f"/content/{encoded.upper()}/1/full.zip", MONIKER) == f"/content/{encoded}/1/full.zip"
    assert respelled(f"/content/{encoded}/1/full.zip", MONIKER) is None
    assert respelled("/content/ContentInfo.txt", MONIKER) is None
    assert respelled("/x", MONIKER) is None
