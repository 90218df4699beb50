"""What validators tell: whether two answers are of one body, and what may go into If-Range."""

import pytest

from gup.upstream.validators import Validators

OLD, NEW, SENT = (f"Sat, 01 Aug 2026 09:00:{second:02} GMT" for second in (0, 1, 30))


@pytest.mark.parametrize(
    ("etag", "last_modified", "date", "sent"),
    [
        ('"a"', OLD, SENT, '"a"'),
        ('"a"', None, None, '"a"'),
        (None, OLD, SENT, OLD),
        (None, OLD, NEW, OLD),  # one second is enough
        (None, OLD, OLD, None),  # it may have been written twice within that second
        (None, NEW, OLD, None),
        (None, OLD, None, None),
        (None, OLD, "yesterday", None),
        (None, "yesterday", SENT, None),
        ('W/"a"', OLD, SENT, OLD),
        ('W/"a"', None, SENT, None),
        ('"' + "a" * 600 + '"', None, None, None),
        ('"\udcff"', None, None, None),
        (None, None, SENT, None),
    ],
)
def test_what_goes_into_if_range(etag, last_modified, date, sent):
    validators = Validators.of(etag, last_modified, date)
    assert validators.if_range == sent
    assert Validators.from_json(validators.to_json()) == validators


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (('"a"', None), ('"a"', None), True),
        (('"a"', None), ('"b"', None), False),
        (('"a"', OLD), ('"a"', NEW), True),  # a strong tag decides alone
        (('"a"', OLD), ('"b"', OLD), False),
        (('W/"a"', None), ('"a"', None), True),
        (('W/"a"', None), ('W/"b"', None), False),
        (('W/"a"', OLD), ('W/"a"', NEW), False),
        (('"a"', OLD), (None, OLD), True),
        (('"a"', OLD), (None, NEW), False),
        (('"a"', None), (None, OLD), False),  # nothing in common
        ((None, OLD), (None, OLD), True),
        ((None, OLD), (None, NEW), False),
        ((None, OLD), (None, None), False),
        ((None, None), ('"a"', None), False),
        ((None, None), (None, None), True),
        (('"\udcff"', None), ('"\udcff"', None), True),
        (('"\udcff"', None), ('"\udcfe"', None), False),
    ],
)
def test_whether_two_answers_are_of_one_body(before, now, same):
    one, other = Validators.of(*before, SENT), Validators.of(*now, SENT)
    assert one.same_as(other) is same
    vouched_for = same or now == (None, None)
    assert one.same_as(other, vouched=True) is vouched_for


@pytest.mark.parametrize("fields", [[], ["a"], [1, None, False], [None, ["x"], True]])
def test_what_is_no_row_of_validators_is_refused(fields):
    with pytest.raises(ValueError, match=r"validator|unpack"):
        Validators.from_json(fields)
