"""The log's two formats."""

import io
import json
import logging
import re

import pytest

from gup import log


@pytest.fixture
def stream():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield io.StringIO()
    root.setLevel(level)
    root.handlers[:] = handlers


def test_text_is_one_line_with_time_level_logger_and_extras(stream):
    log.configure("info", "text", stream)
    logging.getLogger("gup.test").info("worker %d ended", 3, extra={"signal": "SIGKILL"})
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info gup\.test\[\d+\]: worker 3 ended signal=SIGKILL\n"
    assert re.fullmatch(pattern, stream.getvalue())


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_client_sent_cannot_begin_a_line(stream, form):
    log.configure("info", form, stream)
    logging.getLogger().warning("path %s", "/a\r\nfake\x1b[31m\x85\u2028", extra={"agent": "x\ny"})
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_json_is_one_object_a_line(stream):
    log.configure("info", "json", stream)
    logging.getLogger("gup.test").info("ready", extra={"slot": 2, "message_": object})
    fields = json.loads(stream.getvalue())
    assert (fields["level"], fields["logger"], fields["message"], fields["slot"]) == (
        "info",
        "gup.test",
        "ready",
        2,
    )


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_written_with_its_traceback(stream, form):
    log.configure("info", form, stream)
    try:
        raise ValueError("wrong\nhere")  # noqa: TRY301 - to have a traceback
    except ValueError:
        logging.getLogger().exception("failed")
    text = stream.getvalue()
    assert "ValueError: wrong" in text
    assert "Traceback" in text
    assert all(line.startswith(("    ", "20", "{")) for line in text.splitlines())


def test_the_level_holds_and_configuring_again_replaces(stream):
    log.configure("debug", "text", stream)
    again = io.StringIO()
    log.configure("warning", "text", again)
    logging.getLogger().info("not this")
    logging.getLogger().warning("this")
    assert stream.getvalue() == ""
    assert again.getvalue().count("\n") == 1
    assert "this" in again.getvalue()
