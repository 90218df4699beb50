import re
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.key import ANY, BadKeyError, ContentKey, Folder, Kind, Named, Variant, delta_step, named
from gup.content.routes import Routes, delta_path, parse_target, spelled_moniker

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


NO_TEXTS = [None, 5, 1.0, True, [], {}, ["a", "b", "c", "d", "e"]]
OUTSIDE = ["../../../../x", "a/../../../x", "/etc/passwd/a/b", "a/b/c/d/..", "a/b/c/d/"]


@pytest.mark.parametrize("value", [*NO_TEXTS, *OUTSIDE, "", "a/b/c/d", "a/b/c/d/e/f"])
def test_nothing_else_is_read_as_a_key(value):
    with pytest.raises(BadKeyError, match="not a content key"):
        ContentKey.parse(value)


OLD, NEW = "260101001", "260102001"
DELTA = f"xdelta{OLD}_To_{NEW}.dax"


@pytest.mark.parametrize(
    ("revision", "file", "step", "wanted"),
    [
        (OLD, "full.zip", None, Named(Kind.FULL, OLD)),
        (OLD, "FULL.dax", None, Named(Kind.FULL, OLD)),
        (OLD, DELTA, (OLD, NEW), Named(Kind.DELTA, NEW, OLD, Folder.FROM)),
        (NEW, DELTA.upper(), (OLD, NEW), Named(Kind.DELTA, NEW, OLD, Folder.TO)),
        ("260103001", DELTA, (OLD, NEW), Named(Kind.DELTA, NEW, OLD)),
        (OLD, "xdelta1_To_260102001.dax", ("1", NEW), None),
        (OLD, "xdelta190815061.dax", None, None),
        (OLD, DELTA + ".tmp", None, None),
        ("latest", "full.zip", None, None),
        ("26010100", "full.zip", None, None),
        (OLD, "readme.txt", None, None),
        ("_", "ContentInfo.txt", None, None),
    ],
)
def test_the_revisions_that_a_name_tells(revision, file, step, wanted):
    assert delta_step(file) == step
    assert named(ContentKey("any", "any", KEY.stream, revision, file)) == wanted


@pytest.mark.parametrize("folder", Folder)
def test_the_path_of_a_delta_leads_to_a_key_that_names_the_same(folder):
    moniker = "%7B535cb6a4-441F-4e8a-A897-804CD859100E%7D"
    path = delta_path(moniker, OLD, NEW, folder)
    route = Routes().route(parse_target(path.encode()).path)
    assert route.upstream_path == path
    assert named(route.key(Variant())) == Named(Kind.DELTA, NEW, OLD, folder)
    assert spelled_moniker(path) == moniker


@pytest.mark.parametrize("path", ["/content/ContentInfo.txt", "/content/%7B1%7D/1/2/full.zip", "/x.flg", ""])
def test_a_path_without_a_moniker_spells_none(path):
    assert spelled_moniker(path) == ""
