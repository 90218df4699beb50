"""All catalogues together: whose row counts, what streams are called."""

import pytest

from gup.config import Upstream
from gup.content.catalog import parse_catalog
from gup.content.catalogues import Catalogues, Label
from gup.content.routes import LIVEUPDATE_STREAM

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


@pytest.mark.parametrize(
    ("stream", "file", "expected"),
    [
        (
            ("14.3 RU3", "English", PATCH),
            "full.zip",
            Label("SEP Client Patch 14.3 RU3", "14.3 RU3", "English", "client_patches"),
        ),
        (
            ("14.3 RU2", "French", PATCH),
            "full.zip",
            Label("SEP Client Patch 14.3 RU2", "14.3 RU2", "French", "client_patches"),
        ),
        (
            ("any", "any", VIRUS),
            "full.zip",
            Label(
                "SEPC Virus Definitions Win32 12.1 RU6", "12.1 RU6", "SymAllLanguages", "virus_definitions"
            ),
        ),
        (("any", "any", UNKNOWN), "full.zip", None),
        (
            ("14.3 RU2", "SymAllLanguages", LIVEUPDATE_STREAM),
            "SEPC$20Virus$20Definitions$20Win64_14.3$20RU2_SymAllLanguages_livetri.zip",
            Label("SEPC Virus Definitions Win64", "14.3 RU2", "SymAllLanguages", "virus_definitions"),
        ),
        (("any", "any", LIVEUPDATE_STREAM), "1700000000jtun_x.m25", Label("LiveUpdate", "", "any", "other")),
    ],
)
def test_labels(stream, file, expected):
    assert catalogues().label(stream, file) == expected
