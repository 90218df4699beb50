"""Clients by the window in which they were seen."""

from gup.control.stats.client_records import ClientWindows


def test_clients_are_counted_by_window_and_forgotten_beyond_the_limit():
    book = ClientWindows(limit=3)
    book.see(["a"], 0.0)
    book.see(["b", "c"], 90_000.0)
    book.see(["a"], 100_000.0)
    assert book.counts(100_000.0) == {"1h": 1, "1d": 3, "7d": 3}
    book.see(["d"], 100_001.0)
    assert [address for address, _ in book.newest(9)] == ["d", "a", "c"]
    assert len(book.newest(1)) == 1


def test_clients_survive_a_restart_and_newer_sightings_win():
    before, after = ClientWindows(), ClientWindows()
    before.see(["a", "b"], 1.0)
    after.see(["a"], 5.0)
    after.restore(before.newest(9)[::-1])
    assert after.newest(9) == [("a", 5.0), ("b", 1.0)]
