"""What clients state of themselves, where, and how it is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.config import Rules
from gup.content.client_identity import (
    _MOST_REMEMBERED,
    NOBODY,
    NOTHING,
    Declarations,
    Identities,
    Source,
    parse_source,
)
from gup.content.releases import Releases
from gup.server.hot_cache import PLAIN_HEAD
from gup.server.request import parse_head

VERSIONS = ["GUP-Client-Version", "User-Agent: SEP"]
LANGUAGES = ["GUP-Client-Language"]


def client(fields, versions=VERSIONS, languages=LANGUAGES):
    rules = Rules(version_sources=versions, language_sources=languages)
    return Identities(rules, Releases()).read({name.lower(): value for name, value in fields.items()}.get)


def stated(found):
    return found.version and found.version.text, found.language and found.language.text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None)),
        ({"GUP-Client-Version": "14.3 RU2", "GUP-Client-Language": "French"}, ("14.3 RU2", "French")),
        ({"GUP-Client-Version": "  ", "GUP-Client-Language": ""}, (None, None)),
        ({"User-Agent": "SEP/14.3.4615.2000, SEA/14.3"}, ("14.3.4615.2000", None)),
        ({"User-Agent": "Mozilla/5.0 (sep/14.3-RU2; MEM; {6F1C})"}, ("14.3-RU2", None)),
        ({"User-Agent": "NOTSEP/14.3 Mozilla/5.0"}, (None, None)),
        ({"User-Agent": "SEP/ x"}, (None, None)),
        ({"User-Agent": "SEP/14.3.5413.3000", "GUP-Client-Version": "14.3 RU2"}, ("14.3 RU2", None)),
        ({"Accept-Language": "de"}, (None, None)),  # Windows' language, not the client's
    ],
)
def test_sources_are_asked_in_order(fields, expected):
    found = client(fields)
    assert stated(found) == expected
    assert found.notes == ()
    assert expected != (None, None) or found == NOBODY


def test_what_cannot_be_read_counts_as_not_stated_and_says_so():
    found = client({"GUP-Client-Version": "newest", "GUP-Client-Language": "Frrrench, German"})
    assert (found.version, found.language) == (None, None)
    places = ["the version stated in GUP-Client-Version", "the language stated in GUP-Client-Language"]
    assert [note.split(",")[0] for note in found.notes] == places
    assert all("can't be read and counts as not stated" in note for note in found.notes)


def test_the_next_source_speaks_where_the_first_cannot_be_read():
    found = client({"GUP-Client-Version": "x" * 500, "User-Agent": "SEP/14.3.4615.2000"})
    assert found.version.text == "14.3.4615.2000"
    assert len(found.notes) == 1
    assert len(found.notes[0]) < 200


@pytest.mark.parametrize(
    ("value", "language"),
    [
        ("fr-CH, fr;q=0.9, en;q=0.8, *;q=0.5", "fr-CH"),
        ("en;q=0.5, de", "de"),
        ("en;q=0.5, de;q=0.7", "de"),
        ("*", None),
        ("de;q=0", None),
        ("de;q=x, fr;q=0.1", "fr"),
        (",,", None),
    ],
)
def test_accept_language_where_it_is_switched_on(value, language):
    found = client({"Accept-Language": value}, languages=["GUP-Client-Language", "Accept-Language"])
    assert stated(found)[1] == language


def test_other_places_can_be_set():
    fields = {"X-Version": "14.3", "X-Product": "a/1 Agent/14.3.4615.2000"}
    assert client(fields, versions=["X-Version"]).version.text == "14.3"
    assert client(fields, versions=["X-Product: agent"]).version.text == "14.3.4615.2000"
    assert client(fields, versions=[]).version is None


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("X-A", Source("X-A")),
        (" User-Agent : SEP ", Source("User-Agent", "SEP")),
        ("X-A:", None),
        (": SEP", None),
        ("", None),
        ("X A", None),
        ("X-A: B/C", None),
    ],
)
def test_sources_as_the_settings_write_them(text, source):
    assert parse_source(text) == source
    assert source is None or parse_source(source.name) == source


def test_a_client_described_by_hand():
    identities = Identities(Rules(), Releases())
    found = identities.stated("14.3 RU2", None)
    assert stated(found) == ("14.3 RU2", None)
    assert "client-language, 'xx'" in identities.stated(None, "xx").notes[0]


@given(st.text(max_size=300), st.text(max_size=100), st.text(max_size=100))
def test_no_header_breaks_it(agent, version, language):
    client(
        {"User-Agent": agent, "GUP-Client-Version": version, "Accept-Language": language},
        languages=["Accept-Language"],
    )


AGENT = b"User-Agent: SEP/14.3.4615.2000 (x)"
STATED = [
    (b"Accept: */*", "", ""),
    (AGENT, "14.3.4615.2000", ""),
    (b"gup-client-VERSION: 14.3 RU2\r\nGUP-Client-Language:  French\t", "14.3 RU2", "French"),
    (b"Accept: a\r\nX-Note: GUP-Client-Version: 1", "", ""),  # a name within a value
    (b"GUP-Client-Version-Old: 14.3", "", ""),
    (b"GUP-Client-Language: fr\r\nGUP-Client-Language: de", "", "fr, de"),
    (b"GUP-Client-Version: 14.3 RU2\r\nUser-Agent: SEP/1.0", "14.3 RU2", ""),
    (b"GUP-Client-Version: ???\r\n" + AGENT, "14.3.4615.2000", ""),
    (b"GUP-Client-Version: ???", "???", ""),
    (b"GUP-Client-Version: \x85\t1" + b"2" * 100, "1" + "2" * 63, ""),
]


@pytest.mark.parametrize(("lines", "version", "language"), STATED)
def test_bytes_state_what_their_fields_state(lines, version, language):
    head = b"GET /content/a HTTP/1.1\r\nHost: gup:2967\r\n" + lines + b"\r\n\r\n"
    assert PLAIN_HEAD.fullmatch(head)
    declarations = Declarations(Rules())
    found = declarations.of_head(head)
    assert (found.version, found.language) == (version, language)
    assert declarations.of(parse_head(head).headers) is found
    assert (found is NOTHING) == (not version and not language)


def test_without_sources_nothing_is_stated():
    declarations = Declarations(Rules(version_sources=[], language_sources=[]))
    assert declarations.of_head(b"GET / HTTP/1.1\r\nHost: a\r\n" + AGENT + b"\r\n\r\n") is NOTHING


def test_clients_that_state_something_else_each_time_do_not_fill_memory():
    declarations = Declarations(Rules(version_sources=VERSIONS))
    for number in range(2 * _MOST_REMEMBERED):
        assert declarations.of((("gup-client-version", f"14.{number}"),)).version == f"14.{number}"
        assert len(declarations._known) <= _MOST_REMEMBERED
        assert len(declarations._stated) <= _MOST_REMEMBERED + 1
