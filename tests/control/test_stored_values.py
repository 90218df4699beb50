"""Rows, notes and passes that are read back from the index."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.content.key import ContentKey, Kind
from gup.control.index import ROW, make_row, read_row
from gup.control.integrity_jobs import Pass, read_pass
from gup.control.prefetch import PrefetchQueue, Revisions

KNOWN = make_row(
    ContentKey("14.3 RU2", "French", "{S}", "260101001", "full.zip"),
    Kind.FULL,
    10,
    stored_at=0.0,
    used_at=5.0,
    hits=3,
    pinned=True,
    sent_bytes=7,
    received_bytes=9,
)
FIELDS = json.loads(ROW.dump_json(KNOWN))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(list(FIELDS)), inner),
    max_leaves=6,
)


@settings(max_examples=25)
@given(st.sampled_from(list(FIELDS)), anything)
def test_a_row_of_the_index_is_a_row_or_invalid(name, value):
    try:
        read = read_row(json.dumps(FIELDS | {name: value}))
    except ValueError:
        return
    assert read_row(ROW.dump_json(read)) == read


@settings(max_examples=25)
@given(anything)
def test_what_was_noted_is_taken_back_or_left_out(value):
    assert isinstance(read_pass(value), Pass)
    queue, revisions = PrefetchQueue(), Revisions()
    queue.restore([value])
    revisions.restore([value])
    assert list(queue.rows) == list(revisions.streams) == []
    with pytest.raises(ValueError, match=r"."):
        read_row(json.dumps(value))


PASS = Pass(began_at=5.0, ended_at=0.0, after="a/b/c/d/e", checked=1, checked_bytes=2, damaged=3, mended=4)


@pytest.mark.parametrize(
    "changed", [{"began_at": float("nan")}, {"checked": 1.5}, {"after": 5}, {"damaged": True}, {"mended": -1}]
)
def test_a_pass_is_what_was_noted_and_with_a_wrong_value_begins_anew(changed):
    noted = json.loads(json.dumps(PASS.model_dump()))
    assert read_pass(noted) == PASS
    assert read_pass(noted | changed) == Pass()
    for nonsense in (None, {}, [1], "text"):
        assert read_pass(nonsense) == Pass()
