"""Catalogues: as managers write them, whose row counts, and the types of content."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.config import Settings, Upstream
from gup.content.catalog import (
    CLIENT_PATCHES,
    OTHER,
    Catalogues,
    Label,
    StreamTypes,
    normal_moniker,
    parse_catalog,
    respelled,
)
from gup.content.routes import LIVEUPDATE_STREAM

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
        ("x", "x", "", ""),
    ],
)
def test_product_version_and_language_are_told_apart(rest, product, version, language):
    (row,) = parse_catalog(f"{MONIKER}: {rest}\n".encode()).values()
    assert (row.product, row.language) == (product, language)
    assert not row.all_languages, "one that is not stated neither"
    if version:
        assert row.version == version


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(encoding, line_end):
    text = line_end.join((LINE, "stray", LINE.replace("535C", "AAAA"))).encode(encoding)
    assert list(parse_catalog(text)) == [MONIKER.upper(), MONIKER.upper().replace("535C", "AAAA")]


def test_the_last_line_for_a_moniker_counts():
    (row,) = parse_catalog(f"{LINE}\n{MONIKER.lower()}: other - x - French\n".encode()).values()
    assert (row.product, row.moniker) == ("other", MONIKER.lower())


def test_monikers_as_people_write_them():
    spelled = (MONIKER, MONIKER[1:-1], f" {MONIKER.lower()} ")
    assert {normal_moniker(text) for text in spelled} == {MONIKER.upper()}
    assert not any(map(normal_moniker, ("", "x", MONIKER[:-2], MONIKER + "0", "{}")))


PATCH = "{11111111-1111-1111-1111-111111111111}"
VIRUS = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
MIXED = "{22222222-2222-2222-2222-222222222222}"
DEFINITIONS = "SEPC Virus Definitions Win32 12.1 RU6"
UNKNOWN = "{99999999-9999-9999-9999-999999999999}"


def catalogues() -> Catalogues:
    common = f"{VIRUS}: {DEFINITIONS} - MicroDefsB.CurDefs - SymAllLanguages\n"
    french = f"{PATCH}: SEP Client Patch 14.3 RU2 - Patch - French\n{MIXED}: Texts - T - SymAllLanguages\n"
    english = f"{PATCH}: SEP Client Patch 14.3 RU3 - Patch - English\n{MIXED}: Texts - T - English\n"
    return Catalogues(
        {
            "fr": parse_catalog((common + french).encode()),
            "en": parse_catalog((common + english).encode()),
            "gone": parse_catalog(f"{UNKNOWN}: Of an upstream that is no longer configured - X".encode()),
        },
        [
            Upstream(name="fr", url="http://fr", version="14.3 RU2", language="French"),
            Upstream(name="en", url="http://en", version="14.3 RU3", language="English"),
        ],
    )


def test_each_upstream_has_its_own_row():
    found = catalogues()
    assert found.listed("fr", PATCH).language == "French"
    assert found.listed("en", PATCH).version == "14.3 RU3"
    assert found.listed("nobody", PATCH) is None
    assert found.somewhere(UNKNOWN) is None


@pytest.mark.parametrize(
    ("moniker", "expected"), [(VIRUS, True), (PATCH, False), (MIXED, False), (UNKNOWN, False)]
)
def test_what_is_for_all_languages_is_so_in_every_catalogue(moniker, expected):
    assert catalogues().for_all_languages(moniker) is expected


def test_listed_streams_may_be_stored_for_an_upstreams_clients_and_for_all():
    variants = [("14.3 RU2", "French"), ("14.3 RU3", "English"), ("any", "any")]
    expected = {(*variant, moniker) for variant in variants for moniker in (VIRUS, PATCH, MIXED)}
    assert catalogues().streams() == expected


IN_ENGLISH = Label("SEP Client Patch 14.3 RU3", "14.3 RU3", "English", CLIENT_PATCHES)
IN_FRENCH = Label("SEP Client Patch 14.3 RU2", "14.3 RU2", "French", CLIENT_PATCHES)
FOR_ALL = Label(DEFINITIONS, "12.1 RU6", "SymAllLanguages", "virus_definitions")
BY_INDEX = Label("SEPC Virus Definitions Win64", "14.3 RU2", "SymAllLanguages", "virus_definitions")
INDEX_NAME = "SEPC$20Virus$20Definitions$20Win64_14.3$20RU2_SymAllLanguages_livetri.zip"


@pytest.mark.parametrize(
    ("stream", "file", "expected"),
    [
        (("14.3 RU3", "English", PATCH), "full.zip", IN_ENGLISH),
        (("14.3 RU2", "French", PATCH), "full.zip", IN_FRENCH),
        (("any", "any", VIRUS), "full.zip", FOR_ALL),
        (("any", "any", UNKNOWN), "full.zip", None),
        (("14.3 RU2", "SymAllLanguages", LIVEUPDATE_STREAM), INDEX_NAME, BY_INDEX),
        (("any", "any", LIVEUPDATE_STREAM), "17jtun_x.m25", Label("LiveUpdate", "", "any", "other")),
    ],
)
def test_labels(stream, file, expected):
    assert catalogues().label(stream, file) == expected


SHIPPED = StreamTypes(Settings().catalog.types)
PRODUCTS = {
    CLIENT_PATCHES: ["SEPC Client Patch Win64 14.3 RU2", "sepc  CLIENT\tPATCHES"],
    "virus_definitions": ["SEPC Virus Definitions Win32 12.1 RU6"],
    "ips_signatures": ["SEPC IPS Signatures Win64", "SEPC CIDS Signatures 14.3", "SEPC Network Threat 14.3"],
    "behavior_analysis": ["SEPC Behavior Analysis 14.3", "SEPC Behavior And Security Heuristics 14.3"],
    "submission_control": ["SEPC Submission Control Data"],
    OTHER: ["SEPC Extended File Attributes", ""],
}
PRODUCTS["behavior_analysis"].append("SEPC SONAR Definitions")


@pytest.mark.parametrize(("type_", "products"), PRODUCTS.items())
def test_the_shipped_types(type_, products):
    assert {SHIPPED.of(product) for product in products} == {type_}


def test_own_types_are_tried_first_and_an_empty_list_takes_one_away():
    settings = Settings.model_validate(
        {"catalog": {"types": {"servers": ["*definitions win??*"], "submission_control": []}}}
    )
    types = StreamTypes(settings.catalog.types)
    assert types.of("SEPC Virus Definitions Win32 14.3") == "servers"
    assert types.of("SEPC Virus Definitions 14.3") == "virus_definitions"
    assert types.of("SEPC Submission Control") == OTHER
    assert types.names == SHIPPED.names | {"servers"}
