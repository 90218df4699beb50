"""ContentInfo.txt, as managers write it and as it may arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.catalog import normal_moniker, parse_catalog, respelled

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


@pytest.mark.parametrize(
    ("rest", "product", "version", "language"),
    [
        ("SEPC IPS 14.3 RU2 - Ips.CurDefs - French", "SEPC IPS 14.3 RU2", "14.3 RU2", "French"),
        ("Client Patch 14.3 - x64 - Patch - German", "Client Patch 14.3 - x64", "", "German"),
        ("Client Patch 14.3 - French", "Client Patch 14.3", "14.3", "French"),
        ("Client Patch - MicroDefsB.CurDefs", "Client Patch", "", ""),
        ("Client Patch - Patch - fr-CA", "Client Patch", "", "fr-CA"),
        ("Client Patch", "Client Patch", "", ""),
    ],
)
def test_product_version_and_language_are_told_apart(rest, product, version, language):
    (row,) = parse_catalog(f"{MONIKER}: {rest}\n".encode()).values()
    assert (row.product, row.language) == (product, language)
    if version:
        assert row.version == version


def test_a_language_that_is_not_stated_is_not_all_languages():
    (row,) = parse_catalog(f"{MONIKER}: Client Patch\n".encode()).values()
    assert not row.all_languages


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(encoding, line_end):
    text = line_end.join((LINE, "stray", LINE.replace("535C", "AAAA"))).encode(encoding)
    assert list(parse_catalog(text)) == [MONIKER.upper(), MONIKER.upper().replace("535C", "AAAA")]


def test_the_last_line_for_a_moniker_counts():
    (row,) = parse_catalog(f"{LINE}\n{MONIKER.lower()}: other - x - French\n".encode()).values()
    assert (row.product, row.moniker) == ("other", MONIKER.lower())


@pytest.mark.parametrize("text", [MONIKER, MONIKER[1:-1], f" {MONIKER.lower()} "])
def test_monikers_as_people_write_them(text):
    assert normal_moniker(text) == MONIKER.upper()


@pytest.mark.parametrize("text", ["", "x", MONIKER[:-2], MONIKER + "0", "{}"])
def test_what_is_no_moniker(text):
    assert normal_moniker(text) is None
