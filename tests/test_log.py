"""The log: its two formats, and where it goes."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from harness.processes import until

from gup import log
from gup.config import Log
from gup.errors import SettingsError
from gup.log import WritingHandler


@pytest.fixture(autouse=True)
def as_before():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    log.close()
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def file(tmp_path):
    return tmp_path / "written.log"


def configure(destination, level="info", form="text"):
    log.configure(Log(level=level, format=form, destination=str(destination)))


def written(file):
    """All of it: the log's thread has ended."""
    log.close()
    return file.read_text()


def test_text_is_one_line_with_time_level_logger_and_extras(file):
    configure(file)
    logging.getLogger("gup.test").info("worker %d ended", 3, extra={"signal": "SIGKILL"})
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info gup\.test\[\d+\]: worker 3 ended signal=SIGKILL\n"
    assert re.fullmatch(pattern, written(file))


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_client_sent_cannot_begin_a_line(file, form):
    configure(file, form=form)
    logging.getLogger().warning("path %s", "/a\r\nfake\x1b[31m\x85\u2028", extra={"agent": "x\ny"})
    assert len(written(file).splitlines()) == 1
    assert "\x1b" not in written(file)


def test_json_is_one_object_a_line(file):
    configure(file, form="json")
    logging.getLogger("gup.test").info("ready", extra={"slot": 2, "message_": object})
    found = json.loads(written(file))
    assert found | {"level": "info", "logger": "gup.test", "message": "ready", "slot": 2} == found


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_written_with_its_traceback(file, form):
    configure(file, form=form)
    try:
        raise ValueError("wrong\nhere")  # noqa: TRY301 - to have a traceback
    except ValueError:
        logging.getLogger().exception("failed")
    text = written(file)
    assert "ValueError: wrong" in text
    assert "Traceback" in text
    assert all(line.startswith(("    ", "20", "{")) for line in text.splitlines())


def test_the_level_holds_and_configuring_again_replaces(file):
    configure(file, "debug")
    again = file.with_name("again.log")
    configure(again, "warning")
    logging.getLogger().info("not this")
    logging.getLogger().warning("this")
    text = written(again)
    assert file.read_text() == ""
    assert text.count("\n") == 1
    assert "this" in text


# --- destinations


def put(count, text="line"):
    for number in range(count):
        logging.getLogger("gup.test").info("%s %d", text, number)


def test_a_renamed_file_is_left_and_a_new_one_begun(tmp_path):
    path = tmp_path / "gup.log"
    configure(path)
    put(1, "before")
    until(lambda: "before 0" in path.read_text(), "the first line")
    path.rename(tmp_path / "old")
    put(1, "after")
    until(lambda: path.exists() and "after 0" in path.read_text(), "a new file")
    path.unlink()
    path.touch()  # as logrotate's "create" does
    put(1, "third")
    until(lambda: "third 0" in path.read_text(), "the file that was put there")
    log.close()
    assert "after" not in (tmp_path / "old").read_text()


def test_a_file_that_was_truncated_begins_at_its_start(tmp_path):
    path = tmp_path / "gup.log"
    configure(path)
    put(100)
    until(lambda: "line 99" in path.read_text(), "all lines")
    os.truncate(path, 0)  # as logrotate's "copytruncate" does
    put(1, "new")
    log.close()
    assert path.read_bytes().startswith(b"2")
    assert path.read_text().count("\n") == 1


def test_lines_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / "gup.log"
    program = (
        "import logging; from gup import log; from gup.config import Log\n"
        f"log.configure(Log(destination={str(path)!r}, format='json'))\n"
        "for n in range(700): logging.getLogger('gup.test').info('%d %s', n, 'x' * (n % 3000))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait(30) for process in running] == [0, 0, 0]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == 2100
    assert len({line["pid"] for line in found}) == 3


def test_the_journal_gets_a_field_for_each_part(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(10)
        configure(f"journald:{tmp_path / 'journal'}")
        logging.getLogger("gup.test").warning(
            "it is %s", "odd\nPRIORITY=0", extra={"key": "a b", "none": None}
        )
        fields = journal.recv(1 << 16)
        long = "y" * 1_000_000
        logging.getLogger("gup.test").info(long)
        _, fds, _, _ = socket.recv_fds(journal, 10, 1)
        log.close()
    message = b"it is odd\nPRIORITY=0 key=a b"
    assert b"MESSAGE\n" + len(message).to_bytes(8, "little") + message + b"\n" in fields
    assert b"\nGUP_KEY=a b\n" in fields
    assert b"GUP_NONE" not in fields
    assert fields.replace(message, b"").count(b"PRIORITY=") == 1
    assert b"PRIORITY=4\n" in fields
    assert b"MESSAGE=" + long.encode() in os.pread(fds[0], 1 << 21, 0)
    os.close(fds[0])


@pytest.mark.parametrize(
    ("destination", "why"),
    [
        ("{}/none/gup.log", "No such file or directory"),
        ("{}", "Is a directory"),
        ("journald:{}/none", "No such file or directory"),
        ("{}/pipe", "No such device or address"),  # that nobody reads
    ],
)
def test_what_cannot_be_written_to_is_refused_and_the_log_before_stays(tmp_path, file, destination, why):
    os.mkfifo(tmp_path / "pipe")
    configure(file)
    with pytest.raises(SettingsError, match=f"log.destination: .*can't be written to: {why}"):
        configure(destination.format(tmp_path))
    log.configure_child(Log(destination=destination.format(tmp_path)))
    text = written(file)
    assert why in text


@pytest.mark.parametrize("destination", ["gup.log", "journal", "", "syslog", "journald:relative", "stderr:x"])
def test_a_destination_is_one_of_four(destination):
    with pytest.raises(ValueError, match="the absolute path of a file"):
        Log(destination=destination)


class Stuck(log.Destination):
    """Takes nothing until it may."""

    def __init__(self):
        super().__init__()
        self.may = threading.Event()
        self.took = []
        self.error = None

    def write(self, records):
        self.may.wait(20)
        if self.error is not None:
            raise self.error
        self.took += [record.getMessage() for record in records]


def test_nobody_waits_for_a_destination_that_hangs():
    stuck = Stuck()
    handler = WritingHandler(stuck)
    for number in range(10_000):
        handler.handle(logging.makeLogRecord({"msg": "%d", "args": (number,)}))  # returns, or this test hangs
    stuck.may.set()
    handler.close()
    told = [text for text in stuck.took if "were dropped" in text]
    lines = [int(text) for text in stuck.took if text.isdecimal()]
    assert lines == sorted(set(lines)), "in their order, each once"
    assert sum(int(text.split()[0]) for text in told) == 10_000 - len(lines) > 0


def test_a_long_queue_is_written_without_a_pause(monkeypatch):
    """A stop waits two seconds for it. Pauses are for batches that may still grow."""
    stuck, pauses = Stuck(), []
    monkeypatch.setattr(log.time, "sleep", pauses.append)
    handler = WritingHandler(stuck)
    for number in range(8000):
        handler.handle(logging.makeLogRecord({"msg": "%d", "args": (number,)}))
    stuck.may.set()
    handler.close()
    assert [int(text) for text in stuck.took] == list(range(8000))
    assert len(pauses) <= 2, "before the first batch, and before the last"


def test_what_could_not_be_written_is_told_when_it_can(capfd):
    stuck = Stuck()
    stuck.error = OSError(28, "No space left on device")
    stuck.may.set()
    handler = WritingHandler(stuck)
    handler.handle(logging.makeLogRecord({"msg": "lost"}))
    until(lambda: "No space left on device" in capfd.readouterr().err, "standard error tells why")
    stuck.error = None
    handler.handle(logging.makeLogRecord({"msg": "written"}))
    handler.close()
    assert stuck.took[0] == "written"
    assert stuck.took[1].startswith("1 lines of the log were dropped")


def test_a_line_with_wrong_arguments_ends_nothing(capfd):
    stuck = Stuck()
    stuck.may.set()
    handler = WritingHandler(stuck)
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    handler.handle(logging.makeLogRecord({"msg": "right"}))
    handler.close()
    assert stuck.took == ["right"]
    assert "no number" in capfd.readouterr().err
