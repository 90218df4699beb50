"""What clients state of themselves: the same from a parsed head as from its bytes."""

import pytest

from gup.config import Rules
from gup.content.declared import NOTHING, Declarations
from gup.server.plain import PLAIN_HEAD
from gup.server.request import parse_head

HEADS = {
    "nothing": (b"Accept: */*", ("", "")),
    "in the agent": (b"User-Agent: SEP/14.3.4615.2000 (x)", ("14.3.4615.2000", "")),
    "both headers, any case": (
        b"gup-client-VERSION: 14.3 RU2\r\nGUP-Client-Language:  French\t",
        ("14.3 RU2", "French"),
    ),
    "a name within a value": (b"Accept: a\r\nX-Note: GUP-Client-Version: 1", ("", "")),
    "a longer name": (b"GUP-Client-Version-Old: 14.3", ("", "")),
    "said twice": (b"GUP-Client-Language: fr\r\nGUP-Client-Language: de", ("", "fr, de")),
    "not readable": (b"GUP-Client-Version: ???\r\nUser-Agent: SEP/14.3.4615.2000", ("14.3.4615.2000", "")),
}


@pytest.mark.parametrize(("lines", "stated"), HEADS.values(), ids=HEADS)
def test_bytes_state_what_their_fields_state(lines, stated):
    head = b"GET /content/a HTTP/1.1\r\nHost: gup:2967\r\n" + lines + b"\r\n\r\n"
    assert PLAIN_HEAD.fullmatch(head)
    declarations = Declarations(Rules())
    found = declarations.of_head(head)
    assert (found.version, found.language) == stated
    assert declarations.of(parse_head(head).headers) is found
    assert (found is NOTHING) == (stated == ("", ""))


def test_without_sources_nothing_is_stated():
    declarations = Declarations(Rules(version_sources=[], language_sources=[]))
    assert declarations.of_head(b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: SEP/14.3\r\n\r\n") is NOTHING
