"""The log: its two formats, and where it goes."""

import io
import json
import logging
import re

import pytest

from gup import log
from gup.config import Log


@pytest.fixture(autouse=True)
def as_before():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    log.close()
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def stream():
    return io.StringIO()


def configure(level="info", form="text", destination="stderr", stream=None):
    log.configure(Log(level=level, format=form, destination=str(destination)), stream)


def written(stream):
    """All of it: the log's thread has ended."""
    log.close()
    return stream.getvalue()


def test_text_is_one_line_with_time_level_logger_and_extras(stream):
    configure(stream=stream)
    logging.getLogger("gup.test").info("worker %d ended", 3, extra={"signal": "SIGKILL"})
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info gup\.test\[\d+\]: worker 3 ended signal=SIGKILL\n"
    assert re.fullmatch(pattern, written(stream))


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_client_sent_cannot_begin_a_line(stream, form):
    configure(form=form, stream=stream)
    logging.getLogger().warning("path %s", "/a\r\nfake\x1b[31m\x85\u2028", extra={"agent": "x\ny"})
    assert len(written(stream).splitlines()) == 1
    assert "\x1b" not in written(stream)


def test_json_is_one_object_a_line(stream):
    configure(form="json", stream=stream)
    logging.getLogger("gup.test").info("ready", extra={"slot": 2, "message_": object})
    fields = json.loads(written(stream))
    assert (fields["level"], fields["logger"], fields["message"], fields["slot"]) == (
        "info",
        "gup.test",
        "ready",
        2,
    )


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_written_with_its_traceback(stream, form):
    configure(form=form, stream=stream)
    try:
        raise ValueError("wrong\nhere")  # noqa: TRY301 - to have a traceback
    except ValueError:
        logging.getLogger().exception("failed")
    text = written(stream)
    assert "ValueError: wrong" in text
    assert "Traceback" in text
    assert all(line.startswith(("    ", "20", "{")) for line in text.splitlines())


def test_the_level_holds_and_configuring_again_replaces(stream):
    configure("debug", stream=stream)
    again = io.StringIO()
    configure("warning", stream=again)
    logging.getLogger().info("not this")
    logging.getLogger().warning("this")
    text = written(again)
    assert stream.getvalue() == ""
    assert text.count("\n") == 1
    assert "this" in text
