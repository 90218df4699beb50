"""The parts of an exchange that need no connection: validators, header fields, Retry-After, failures."""

import time

import pytest
from pydantic import TypeAdapter

from gup.errors import SHOWN_BYTES
from gup.upstream.exchange import (
    UpstreamFailure,
    Validators,
    gup_names,
    read_age,
    retry_after_seconds,
)

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
    assert TypeAdapter(Validators).validate_python(list(validators)) == validators


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


@pytest.mark.parametrize(
    ("text", "date", "seconds"),
    [
        (None, None, None),
        ("120", None, 120),
        (" 7 ", None, 7),
        ("0", None, None),
        ("-5", None, None),
        ("1.5", None, None),
        ("soon", None, None),
        ("7200", None, 3600),
        ("9" * 12, None, 3600),
        ("9" * 4000, None, None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", None, 37),
        ("Sun, 06 Nov 1994 08:48:37 GMT", None, None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:39:37 GMT", 600),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "yesterday", 37),
        ("Mon, 07 Nov 1994 08:49:37 GMT", None, 3600),
    ],
)
def test_retry_after_is_seconds_or_a_date_an_hour_at_most(text, date, seconds):
    assert retry_after_seconds(text, date, 784111740.0) == seconds


def test_fields_that_others_wrote_are_read_with_care():
    assert [read_age(text) for text in (None, "", "7", "-7", "7.5", "x", "9" * 12)] == [
        *(0, 0, 7, 0, 0, 0),
        1 << 31,
    ]


@pytest.mark.parametrize(
    ("via", "names"),
    [
        (None, ()),
        (
            "1.1 a (gup), 1.0 fred,1.1 b (gup) , HTTP/1.1 p.net:80 (gup), 1.1 c (squid), ",
            ("a", "b", "p.net:80"),
        ),
        ("1.1 a (gup) x, 1.1 (gup), a (gup), 1.1 a(gup), 1.1 a (GUP)", ()),
        (f"1.1 {'a' * 129} (gup), 1.1 {'b' * 128} (gup)", ("b" * 128,)),
        ("," * 16_000, ()),
    ],
)
def test_of_via_the_gups_are_read(via, names):
    began = time.process_time()
    assert gup_names(via) == names
    assert time.process_time() - began < 0.2


@pytest.mark.parametrize("hostile", ["\x1b[2J\x07", "<script>", "x" * 100_000, "\udcff\u202e"])
def test_what_an_upstream_wrote_is_bounded_and_printable_in_a_failure(hostile):
    failure = UpstreamFailure("error", "upstream-error", f"manager broke HTTP: {hostile}", again=True)
    assert len(failure.detail.encode()) <= SHOWN_BYTES
    assert failure.detail.isprintable()
    assert str(failure) == failure.detail
