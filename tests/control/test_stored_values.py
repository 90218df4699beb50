"""Rows, notes and passes that are read back from the index."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.content.key import ContentKey, Kind
from gup.control.index import Row, make_row
from gup.control.integrity_jobs import Pass
from gup.control.prefetch import PrefetchQueue
from gup.jsonmodel import InvalidError

ROW = make_row(
    ContentKey.parse("14.3 RU2/French/{S}/260101001/full.zip"), Kind.FULL, 10, stored_at=0.0, used_at=0.0
)
PASS = {"began_at": 5.0, "ended_at": 0.0, "after": "a/b/c/d/e"}
PASS |= {"checked": 1, "checked_bytes": 2, "damaged": 0, "mended": 0}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*PASS, "key"]), inner),
    max_leaves=6,
)


@given(st.sampled_from(sorted(ROW.to_json())), anything)
@settings(max_examples=50)
def test_what_was_stored_is_taken_back_or_left_out(name, value):
    assert isinstance(Pass.from_json(value), Pass)
    queue = PrefetchQueue()
    queue.restore([value])
    assert len(queue) == 0
    with pytest.raises(InvalidError):
        Row.from_json(value)
    try:
        read = Row.from_json(ROW.to_json() | {name: value})
    except InvalidError:
        return
    assert Row.from_json(read.to_json()) == read


def test_a_pass_with_a_wrong_value_begins_anew():
    assert Pass.from_json(PASS).after == "a/b/c/d/e"
    for name, wrong in (("began_at", float("nan")), ("checked", 1.5), ("after", 5), ("mended", -1)):
        assert Pass.from_json(PASS | {name: wrong}) == Pass()
