import re
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.key import ANY, BadKeyError, ContentKey, Variant, delta_step

KEY = ContentKey("14.3 RU2", "de", "{07B590B3-9282-482F-BBAA-6D515D385869}", "190815061", "full.zip")

PARTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="/"),
    min_size=1,
    max_size=60,
).filter(lambda part: part[0] != ".")
KEYS = st.builds(ContentKey, PARTS, PARTS, PARTS, PARTS, PARTS)


def test_a_key_is_a_line_and_a_path():
    assert KEY.text == "14.3 RU2/de/{07B590B3-9282-482F-BBAA-6D515D385869}/190815061/full.zip"
    assert KEY.path == PurePosixPath(KEY.text)
    assert KEY.variant == Variant("14.3 RU2", "de")
    assert Variant() == Variant(ANY, ANY)


def test_the_names_of_a_keys_files_never_change():
    # Parts and claims of an earlier release must be found again.
    assert KEY.id == "66c6c1ab8b2a9b19bd4c00add78ede18"
    assert KEY.claim_offset == int(KEY.id[:16], 16) >> 2


@given(KEYS)
def test_a_key_is_read_as_it_was_written(key):
    assert ContentKey.parse(key.text) == key
    assert len(key.path.parts) == 5
    assert 0 <= key.claim_offset < 1 << 62
    assert re.fullmatch("[0-9a-f]{32}", key.id)


@given(KEYS, KEYS)
def test_different_keys_have_different_names(first, second):
    assert (first == second) == (first.id == second.id) == (first.text == second.text)


@pytest.mark.parametrize(
    "part", ["", ".", "..", ".hidden", "a/b", "a\0b", "a\r\nb", "\x1b[2J", "\udcff", "é" * 121]
)
@pytest.mark.parametrize("place", range(5))
def test_unsafe_parts_are_no_key(part, place):
    parts = ["a", "b", "c", "d", "e"]
    parts[place] = part
    with pytest.raises(BadKeyError, match="not a content key: its part"):
        ContentKey(*parts)
    with pytest.raises(BadKeyError, match="key"):
        ContentKey.parse("/".join(parts))


@pytest.mark.parametrize("value", [None, 5, 1.0, True, [], {}, ["a", "b", "c", "d", "e"]])
def test_what_is_no_text_is_no_key(value):
    with pytest.raises(BadKeyError, match="not a content key"):
        ContentKey.parse(value)


@pytest.mark.parametrize(
    "text", ["../../../../x", "a/../../../x", "/etc/passwd/a/b", "a/b/c/d/..", "a/b/c/d/"]
)
def test_no_key_leads_out_of_the_cache_directory(text):
    with pytest.raises(BadKeyError):
        ContentKey.parse(text)


@pytest.mark.parametrize("text", ["", "a/b/c/d", "a/b/c/d/e/f"])
def test_a_key_has_five_parts(text):
    with pytest.raises(BadKeyError, match="five parts"):
        ContentKey.parse(text)


@pytest.mark.parametrize(
    ("file", "step"),
    [
        ("xdelta190815061_To_190816061.dax", ("190815061", "190816061")),
        ("XDELTA1_TO_2.DAX", ("1", "2")),
        ("xdelta190815061.dax", None),
        ("xdelta1_To_2.dax.tmp", None),
        ("full.zip", None),
    ],
)
def test_a_deltas_name_tells_from_where_to_where(file, step):
    found = delta_step(file)
    assert (found and (found.from_revision, found.to_revision)) == step
