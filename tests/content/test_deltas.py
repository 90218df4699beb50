"""Names of deltas and fulls: what they tell, and where a delta lies."""

import pytest

from gup.content.deltas import Folder, Named, delta_path, named, spelled_moniker
from gup.content.key import ContentKey, Kind, Variant
from gup.content.routes import Routes, parse_target

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"


def key(revision: str, file: str) -> ContentKey:
    return ContentKey("any", "any", MONIKER, revision, file)


@pytest.mark.parametrize(
    ("revision", "file", "wanted"),
    [
        ("260101001", "full.zip", Named(Kind.FULL, "260101001")),
        ("260101001", "FULL.dax", Named(Kind.FULL, "260101001")),
        (
            "260101001",
            "xdelta260101001_To_260102001.dax",
            Named(Kind.DELTA, "260102001", "260101001", Folder.FROM),
        ),
        (
            "260102001",
            "XDelta260101001_to_260102001.DAX",
            Named(Kind.DELTA, "260102001", "260101001", Folder.TO),
        ),
        ("260103001", "xdelta260101001_To_260102001.dax", Named(Kind.DELTA, "260102001", "260101001")),
        ("260101001", "xdelta1_To_260102001.dax", None),
        ("260101001", "xdelta_something.dax", None),
        ("latest", "full.zip", None),
        ("26010100", "full.zip", None),
        ("260101001", "readme.txt", None),
        ("_", "ContentInfo.txt", None),
    ],
)
def test_what_a_name_tells(revision, file, wanted):
    assert named(key(revision, file)) == wanted


@pytest.mark.parametrize("folder", Folder)
def test_the_path_of_a_delta_leads_to_a_key_that_names_the_same(folder):
    path = delta_path("%7B535cb6a4-441F-4e8a-A897-804CD859100E%7D", "260101001", "260102001", folder)
    route = Routes().route(parse_target(path.encode()).path)
    assert route.upstream_path == path
    assert named(route.key(Variant())) == Named(Kind.DELTA, "260102001", "260101001", folder)


@pytest.mark.parametrize(
    ("path", "moniker"),
    [
        ("/content/%7B535cb6a4%7D/260101001/full.zip", "%7B535cb6a4%7D"),
        ("/content/ContentInfo.txt", ""),
        ("/content/%7B1%7D/260101001/deeper/full.zip", ""),
        ("/minitri.flg", ""),
        ("", ""),
    ],
)
def test_the_moniker_as_it_was_spelled(path, moniker):
    assert spelled_moniker(path) == moniker
