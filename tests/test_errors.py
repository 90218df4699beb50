"""Text that somebody else wrote is bounded and printable wherever a message shows it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.errors import SHOWN_BYTES, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("404 Not Found", "404 Not Found"),
        ("Größe", "Größe"),
        (b"Gr\xc3\xb6\xc3\x9fe", "Größe"),
        (b"\xff\x00", "\\xff\\x00"),
        ("\udcff", "\\xff"),
        ("\x1b[2J\r\n", "\\x1b[2J\\x0d\\x0a"),
        ("\u202eexe", "\\u202eexe"),
        ("\u2028\U000e0001", "\\u2028\\U000e0001"),
        ("<b>&", "<b>&"),
        ("x" * 512, "x" * 512),
        ("x" * 513, "x" * 509 + "…"),
        (b"x" * 100_000, "x" * 509 + "…"),
    ],
)
def test_what_is_shown(text: str | bytes, shown: str) -> None:
    assert quoted(text) == shown


@given(st.one_of(st.text(max_size=700), st.binary(max_size=700)))
def test_any_text_is_bounded_printable_and_stays_as_it_is_when_quoted_again(text: str | bytes) -> None:
    shown = quoted(text)
    assert len(shown.encode()) <= SHOWN_BYTES
    assert shown.isprintable()
    assert quoted(shown) == shown
