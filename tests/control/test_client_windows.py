"""Clients by the window in which they were seen."""

import random

from gup.control.stats.client_records import WINDOWS, ClientWindows


def test_clients_are_counted_by_window_and_forgotten_beyond_the_limit():
    book = ClientWindows(limit=3)
    book.see(["a"], 0.0)
    book.see(["b", "c"], 90_000.0)
    book.see(["a"], 100_000.0)
    assert book.counts(100_000.0) == {"1h": 1, "1d": 3, "7d": 3}
    book.see(["d"], 100_001.0)
    assert [address for address, _ in book.newest(9)] == ["d", "a", "c"]
    assert len(book.newest(1)) == 1


def test_newer_sightings_stay_when_clients_are_taken_back():
    before, after = ClientWindows(), ClientWindows()
    before.see(["a", "b"], 1.0)
    after.see(["a"], 5.0)
    after.restore(before.newest(9))
    assert after.newest(9) == [("a", 5.0), ("b", 1.0)]


def test_clients_are_counted_as_if_all_were_looked_at():
    chance, book, seen, now = random.Random(1), ClientWindows(), {}, 1e6
    for _ in range(600):
        now += chance.choice([0.0, 30.0, 1800.0, 3600.0, 40_000.0])
        names = [f"c{chance.randrange(80)}" for _ in range(chance.randrange(4))]
        book.see(names, now)
        seen |= dict.fromkeys(names, now)
        assert book.counts(now) == {
            window: sum(now - at <= seconds for at in seen.values()) for window, seconds in WINDOWS.items()
        }
        if chance.random() < 0.05:
            rows, book = book.newest(1000), ClientWindows()
            assert dict(rows) == seen
            book.restore(rows)
    newest = [at for _, at in book.newest(1000)]
    assert newest == sorted(newest, reverse=True)
