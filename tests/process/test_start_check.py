"""What can't work as it is set is told, and nothing else."""

import os
import time

import pytest

from gup.config import Settings
from gup.process.start_check import doubts, of_clocks, of_rate

NOW = time.time()


@pytest.fixture
def told(tmp_path):
    """The doubts about a cache directory with these files, under these limits."""

    def told(*files, now=NOW, **cache):
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        given = {"directory": str(tmp_path), "min_free": 0, **cache}
        return doubts(Settings.model_validate({"cache": given}), now)

    return told


def test_a_directory_of_gups_own_on_a_disk_with_room_is_no_cause_for_words(told):
    assert (
        told() == told("content/a", "partial/claims", "index/x", "reports/s", "run/x", "lost+found/x") == []
    )


@pytest.mark.parametrize(
    ("proxies", "allowed", "named"),
    [
        (["10.0.0.9/32", "fd00::9/128"], ["10.0.0.0/24", "fd00::/8"], []),
        (["10.0.0.9/32", "192.0.2.0/24"], ["10.0.0.0/24", "::/0"], ["192.0.2.0/24"]),
        (["10.0.0.0/8", "2001:db8::/64"], ["10.0.0.0/24"], ["10.0.0.0/8", "2001:db8::/64"]),
    ],
)
def test_proxies_whose_own_connections_are_refused(tmp_path, proxies, allowed, named):
    given = {"listen": {"proxy_protocol": proxies}, "clients": {"allow": allowed}}
    cache = {"directory": str(tmp_path), "min_free": 0}
    told = doubts(Settings.model_validate({"cache": cache, **given}), NOW)
    assert [words.split()[1] for words in told] == named
    assert all("is not in clients.allow" in words for words in told)


def test_room_that_must_stay_free_and_is_not_there(told, tmp_path):
    figures = os.statvfs(tmp_path)
    size, free = figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize
    (words,) = told(min_free=size)
    assert "cache.min_free is" in words
    assert "in all: nothing can be stored; lower it" in words
    (words,) = told(min_free=(size + free) // 2)
    assert "cache.min_free is" in words
    assert "until there is more" in words
    assert told("content/14.3", min_free=(size + free) // 2) == [], "a full cache is no surprise"


def test_files_of_others_are_named(told, tmp_path):
    (words,) = told("holiday.jpg", "content/x", "c", "b", "a")
    assert f"{tmp_path} holds files that are not gup's (a, b, c and 1 more)" in words


def test_a_clock_behind_what_it_wrote_itself(told):
    (words,) = told(now=NOW - 30 * 365 * 86400)
    assert "set the clock" in words


@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        ({}, None),
        ({"hq": 299.0}, None),
        ({"hq": -7200.0}, "2 h behind that of hq"),
        ({"hq": 86400.0, "spare": 90000.0}, "1 d ahead of that of hq"),
        ({"hq": 86400.0, "spare": 1.0}, None),
    ],
)
def test_a_clock_that_differs_from_all_upstreams(ahead, words):
    found = list(of_clocks(ahead))
    assert [words in text for text in found] == [True] * (words is not None)


@pytest.mark.parametrize(
    ("limit", "fastest", "received", "is_told"),
    [
        (8_000_000, 3_000_000, 2_000_000_000, True),
        (8_000_000, 5_000_000, 2_000_000_000, False),
        (8_000_000, 3_000_000, 1_000_000, False),
        (0, 3_000_000, 2_000_000_000, False),
    ],
)
def test_a_rate_above_what_was_measured(limit, fastest, received, is_told):
    found = list(of_rate(limit, fastest, received))
    assert [("wan.rate is 8MB/s" in text, "3.0 MB/s" in text) for text in found] == [(True, True)] * is_told
