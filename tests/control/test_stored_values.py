"""Rows, notes and passes that are read back from the index."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.key import ContentKey, Kind
from gup.control.index import Row, make_row
from gup.control.integrity_jobs import Pass
from gup.control.prefetch import PrefetchQueue
from gup.jsonmodel import InvalidError

KEY = "14.3 RU2/French/{S}/260101001/full.zip"


def row(name="full.zip", kind=Kind.FULL, revision="260101001", length=10, **more):
    key = ContentKey("14.3 RU2", "French", "{S}", revision, name)
    return make_row(key, kind, length, stored_at=more.pop("stored_at", 0.0), used_at=0.0, **more)


NAMES = ["type", "key", "length", "uses", "at", "bytes", "clients", "problem"]
TYPES = ["committed", "used", "taken", "need", "failed"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(TYPES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner),
)


ROW = row()


@given(st.sampled_from(sorted(ROW.to_json())), anything)
def test_a_row_of_the_index_is_a_row_or_invalid(name, value):
    fields = ROW.to_json() | {name: value}
    try:
        read = Row.from_json(fields)
    except InvalidError:
        return
    assert Row.from_json(read.to_json()) == read


@given(anything)
def test_what_was_noted_is_taken_back_or_left_out(value):
    assert isinstance(Pass.from_json(value), Pass)
    wishes = PrefetchQueue()
    wishes.restore([value])
    assert len(wishes) == 0
    with pytest.raises(InvalidError):
        Row.from_json(value)


@pytest.mark.parametrize(
    "changed",
    [{"began_at": float("nan")}, {"checked": 1.5}, {"after": 5}, {"damaged": True}, {"mended": -1}],
)
def test_a_pass_with_a_wrong_value_begins_anew(changed):
    kept = {"began_at": 5.0, "ended_at": 0.0, "after": "a/b/c/d/e"}
    kept |= {"checked": 1, "checked_bytes": 2, "damaged": 0, "mended": 0}
    assert Pass.from_json(kept).after == "a/b/c/d/e"
    assert Pass.from_json(kept | changed) == Pass()
