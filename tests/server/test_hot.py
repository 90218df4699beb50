"""The hot lane's table: what makes it forget."""

import errno
import os
from types import SimpleNamespace

import pytest

from gup.server.hot import HotRow, HotTable


class Row:
    """As much of a HotRow as the table looks at."""

    class entry:  # noqa: N801 - an attribute
        all_verified = True
        fd = 0

    fresh_until = None
    used = True


@pytest.fixture
def epochs():
    return {"policy": 1, "store": 1}


@pytest.fixture
def table(epochs):
    return HotTable(lambda: (epochs["policy"], epochs["store"]), lambda: None)


def test_a_decision_made_before_the_settings_came_is_not_learned_after(table):
    """The policy's epoch rises when settings are sent; they arrive later, and `drop` is called then."""
    before = table.epochs
    table.drop()
    table.learn(b"head", b"/x", Row(), before)
    assert table.find_target(b"/x") is None
    table.learn(b"head", b"/x", Row(), table.epochs)
    assert table.find_target(b"/x") is not None
    assert table.find(b"head") is not None


def test_new_settings_drop_what_was_learned_under_the_new_epoch_by_the_old_ones(table, epochs):
    epochs["policy"] += 1
    table.learn(b"head", b"/x", Row(), table.epochs)
    assert table.find(b"head") is not None
    table.drop()
    assert table.find(b"head") is None


def test_the_policys_epoch_drops_the_table_by_itself(table, epochs):
    table.learn(None, b"/x", Row(), table.epochs)
    epochs["policy"] += 1
    assert table.find_target(b"/x") is None


def test_an_entry_that_is_doubted_is_not_answered_hot(table):
    row = Row()
    row.entry = type("entry", (), {"all_verified": False, "fd": 0})
    table.learn(None, b"/x", row, table.epochs)
    assert table.find_target(b"/x") is None


@pytest.mark.parametrize("read", [OSError(errno.EIO, "broken"), b"short"])
def test_a_small_body_that_can_not_be_read_is_not_answered_hot_and_its_entry_is_told(monkeypatch, read):
    told = []
    entry = SimpleNamespace(fd=0, available=lambda *_: 100, unreadable=lambda: told.append(True))

    def pread(*_):
        if isinstance(read, OSError):
            raise read
        return read

    row = object.__new__(HotRow)
    row.entry, row.length, row.few = entry, 100, True
    monkeypatch.setattr(os, "pread", pread)
    assert row.small() is None
    assert told == [True]
