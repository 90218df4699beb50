"""What is said of sizes: the knee, the present size, short records, what was left out."""

from types import SimpleNamespace

import pytest

from gup.control import replay
from gup.control.eviction_plan import DiskUsage
from gup.control.size_curve import ReplayError, _answer, run_replay
from gup.control.stats.demand_files import KEYS, ROWS, Line, append

GB, DAY, NOW = 10**9, 86400.0, 1_800_000_000.0
SIZES = [5 * GB, 10 * GB, 20 * GB, 40 * GB, 80 * GB]


def said(wan, everything=100, *, days=30, room=200, left_out=(), **found):
    """For stores of SIZES that fetch so many GB; 20 GB is the present one, the last of all is unlimited."""
    stores = [
        {"wan_bytes": gb * GB, "fetches": gb, "peak_bytes": everything * GB, "left_out": n in left_out}
        for n, gb in enumerate(wan)
    ]
    figures = {"requests": 5, "requested_bytes": 9, "unknown": 0, "failed": 0} | found
    figures |= {"sent_bytes": 9, "received_bytes": 9, "first_at": NOW - days * DAY, "until": NOW}
    record = SimpleNamespace(on=True, bytes=1)
    disk = DiskUsage((), room * GB, 0)
    return _answer({**figures, "stores": stores}, SIZES, 20 * GB, disk, record, NOW)


NOTHING = "A larger store would have saved nothing more in the last"
HARDLY = "A larger store would have saved hardly anything more in the last 30 d: all that was asked for"
CASES = {
    "a larger one saves": (
        {"wan": [90, 80, 60, 29, 29, 29]},
        [
            "40.0 GB would have saved 31.0 GB more in the last 30 d.",
            "Beyond 40.0 GB hardly anything more is saved.",
        ],
    ),
    "half of it is had for less": (
        {"wan": [90, 80, 60, 40, 29, 29]},
        [
            "80.0 GB would have saved 31.0 GB more in the last 30 d.",
            "40.0 GB alone would have saved 20.0 GB of it.",
            "Beyond 80.0 GB hardly anything more is saved.",
        ],
    ),
    "the disk has no room for it": (
        {"wan": [90, 80, 60, 29, 29, 29], "room": 30},
        [
            "40.0 GB would have saved 31.0 GB more in the last 30 d.",
            "Beyond 40.0 GB hardly anything more is saved.",
            "The disk has room for 30.0 GB in all.",
        ],
    ),
    "it is enough": (
        {"wan": [90, 29, 29, 29, 29, 29], "everything": 9},
        [
            f"{NOTHING} 30 d: all that was asked for takes 9.0 GB, and the store may have 20.0 GB.",
            "10.0 GB would have been enough.",
        ],
    ),
    "nobody asks again for what went": (
        {"wan": [30, 29, 29, 29, 29, 29], "everything": 50},
        [f"{HARDLY} takes 50.0 GB, and what is evicted is hardly asked for again."],
    ),
    "it grows to the end": (
        {"wan": [90, 80, 60, 50, 40, 9], "everything": 300},
        [
            "300 GB would have saved 51.0 GB more in the last 30 d.",
            "Beyond 300 GB hardly anything more is saved.",
            "The disk has room for 200 GB in all.",
        ],
    ),
    "a short record": (
        {"wan": [29, 29, 29, 29, 29, 29], "everything": 4, "days": 2, "unknown": 1234},
        [
            f"{NOTHING} 2 d: all that was asked for takes 4.0 GB, and the store may have 20.0 GB.",
            "5.0 GB would have been enough.",
            "Only 2 d are recorded yet: a month would say more.",
            "The size is not known of the bodies of 1,234 requests.",
        ],
    ),
    "nothing was asked for": ({"wan": [0] * 6, "requests": 0}, ["Nothing was requested yet."]),
}  # fmt: skip


@pytest.mark.parametrize(("given", "saying"), CASES.values(), ids=CASES)
def test_what_is_said(given, saying):
    answer = said(**given)
    assert answer.saying == saying
    assert [point.size_bytes for point in answer.points] == sorted({p.size_bytes for p in answer.points})
    assert next(p.saved_more_bytes for p in answer.points if p.factor == 1) == 0


async def test_a_process_answers_as_a_thread_and_says_why_it_can_not(tmp_path):
    path = tmp_path / "00000001-1800000000.demand"
    path.touch()
    keys = [(n, f"any/any/{{A{n}}}/260101001/full.zip", "full", 100, 0) for n in range(9)]
    append(path, [(KEYS, keys), (ROWS, [Line(NOW, 9.0, 0, 0, 0, 0, 0, [n % 9, 0, 1]) for n in range(90)])], 0)
    limits = {"max_size": 0, "min_free": 0, "keep_revisions": 10, "max_unused": 0.0, "max_part_age": 0.0}
    asked = {"folder": str(tmp_path), "limits": limits, "sizes": [500, 1000], "since": 0.0, "keeps": 2}
    by_process, by_thread = await run_replay(asked), replay.answer(asked)
    assert by_process | {"seconds": 0} == by_thread | {"seconds": 0}
    assert [store["wan_bytes"] for store in by_thread["stores"]] == [9000, 900, 900]
    with pytest.raises(ReplayError, match="did not end within 0 s"):
        await run_replay(asked, most_seconds=0.0)


@pytest.mark.long
async def test_a_dry_run_is_a_process_too_and_a_failure_is_told(tmp_path):
    tables = {"tried": {"cache": {"max_size": 10**6}}}
    found = await run_replay({"folder": str(tmp_path), "settings": tables, "since": 0.0}, "dry_run")
    assert found["settings"]["tried"]["wan_bytes"] == 0
    with pytest.raises(ReplayError, match="ended with status 1"):
        await run_replay({"folder": str(tmp_path)})


def test_sizes_that_took_too_long_are_left_out_and_named():
    answer = said([900, 800, 60, 29, 29, 29], left_out=(0, 1))
    assert [point.factor for point in answer.points] == [1, 2, 4, 5]
    assert "Sizes up to 10.0 GB are left out: the replay would take too long." in answer.saying
