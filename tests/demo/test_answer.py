from datetime import UTC, datetime

import pytest
from multidict import CIMultiDict

from gup.demo.answer import Answer, Validators, decide

KNOWN = Validators('"abc"', datetime(2025, 3, 3, 6, tzinfo=UTC))
SAME, LATER = "Mon, 03 Mar 2025 06:00:00 GMT", "Mon, 03 Mar 2025 07:00:00 GMT"
EARLIER = "Sun, 02 Mar 2025 06:00:00 GMT"
WHOLE, UNCHANGED = Answer(200, 0, 1000), Answer(304, 0, 0)


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({}, WHOLE),
        ({"Range": "bytes=0-0"}, Answer(206, 0, 1)),
        ({"Range": "bytes=10-19"}, Answer(206, 10, 20)),
        ({"Range": "bytes=990-2000"}, Answer(206, 990, 1000)),
        ({"Range": "bytes=500-"}, Answer(206, 500, 1000)),
        ({"Range": "bytes=-10"}, Answer(206, 990, 1000)),
        ({"Range": "bytes=-5000"}, Answer(206, 0, 1000)),
        ({"Range": "bytes=1000-"}, Answer(416, 0, 0)),
        ({"Range": "bytes=-0"}, Answer(416, 0, 0)),
        ({"Range": "bytes=20-10"}, WHOLE),
        ({"Range": "bytes=-"}, WHOLE),
        ({"Range": "bytes=0-1,5-6"}, WHOLE),
        ({"Range": "lines=0-1"}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": '"abc"'}, Answer(206, 5, 1000)),
        ({"Range": "bytes=5-", "If-Range": 'W/"abc"'}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": '"other"'}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": SAME}, Answer(206, 5, 1000)),
        ({"Range": "bytes=5-", "If-Range": LATER}, WHOLE),
        ({"If-None-Match": '"abc"'}, UNCHANGED),
        ({"if-none-match": 'W/"abc", "x"'}, UNCHANGED),
        ({"If-None-Match": "*"}, UNCHANGED),
        ({"If-None-Match": '"x"', "If-Modified-Since": LATER}, WHOLE),
        ({"If-Modified-Since": SAME}, UNCHANGED),
        ({"If-Modified-Since": EARLIER}, WHOLE),
        ({"If-Modified-Since": "yesterday"}, WHOLE),
        ({"If-None-Match": '"abc"', "Range": "bytes=0-1"}, UNCHANGED),
    ],
)
def test_conditions_and_ranges(headers, answer):
    assert decide(CIMultiDict(headers), KNOWN, 1000) == answer


def test_the_date_is_written_as_http_wants_it():
    assert KNOWN.last_modified == SAME
