"""Which revisions a site's clients come from, by the traffic; and the list of what is to be prefetched."""

import json

import pytest

from gup.content.key import ContentKey, Folder, Kind, delta_step, named
from gup.content.routes import path_of
from gup.control.prefetch import MAX_REVISIONS, Outcome, PrefetchQueue, QueuedFetch, Revisions

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
STREAM = ("any", "any", MONIKER)
DAY = 86400.0


def delta(old: str, new: str, folder: str | None = None) -> ContentKey:
    return ContentKey(*STREAM, folder or old, f"xdelta{old}_To_{new}.dax")


def full(revision: str) -> ContentKey:
    return ContentKey(*STREAM, revision, "full.zip")


def learn(revisions: Revisions, key: ContentKey, now: float = 0.0, moniker: str = "") -> bool:
    names = named(key)
    assert names is not None
    return revisions.learn((key.version, key.language, key.stream), names, now, moniker)


def wanted(revisions: Revisions, now: float = 0.0, most: int = 8) -> tuple[str, list[str]]:
    found = revisions.announced(STREAM, now, within_seconds=7 * DAY, most=most)
    return found.revision, [delta_step(path.rpartition("/")[2]).from_revision for path in found.paths]


def test_the_first_that_names_a_revision_announces_it_to_all_others():
    revisions = Revisions()
    for number in range(1, 4):
        assert learn(revisions, delta(f"26010100{number}", "260110001"), number)
    assert wanted(revisions) == ("260110001", [])  # who asked has what it wants
    assert learn(revisions, delta("260101002", "260111001"), 10.0)
    assert wanted(revisions, 10.0) == ("260111001", ["260110001", "260101003", "260101001"])
    assert wanted(revisions, 10.0, most=2) == ("260111001", ["260110001", "260101003"])
    assert not learn(revisions, delta("260101002", "260111001"), 11.0)
    assert not learn(revisions, delta("260101001", "260111001"), 12.0)
    assert wanted(revisions, 12.0) == ("260111001", ["260110001", "260101003"])


def test_a_full_announces_too_and_those_who_took_it_are_at_its_revision():
    revisions = Revisions()
    assert learn(revisions, full("260110001"), 0.0)
    assert learn(revisions, full("260111001"), 1.0)
    assert wanted(revisions, 1.0) == ("260111001", ["260110001"])


def test_an_older_revision_announces_nothing_and_only_what_was_named_lately_counts():
    revisions = Revisions()
    learn(revisions, delta("260101001", "260111001"), 0.0)
    assert learn(revisions, delta("260101002", "260110001"), 1.0)  # revisions that were not known: look again
    assert wanted(revisions, 1.0) == ("260111001", ["260110001", "260101002"])
    assert wanted(revisions, 7 * DAY + 0.5) == ("260111001", ["260110001", "260101002"])
    assert wanted(revisions, 8 * DAY) == ("260111001", [])


def test_what_upstream_does_not_have_announces_nothing_but_tells_where_a_client_is():
    revisions = Revisions()
    revisions.refused(STREAM, named(delta("260101009", "999999999")), 0.0)
    assert list(revisions.streams) == []
    learn(revisions, delta("260101001", "260110001"), 0.0)
    revisions.refused(STREAM, named(delta("260101008", "999999999")), 0.0)
    revisions.refused(STREAM, named(delta("260101007", "260110001")), 0.0)  # not there: not tried
    assert wanted(revisions) == ("260110001", ["260101008"])
    learn(revisions, full("260111001"), 1.0)
    assert set(wanted(revisions, 1.0)[1]) == {"260101001", "260101007", "260101008", "260110001"}


@pytest.mark.parametrize(("folder", "under"), [("260101001", "260110001"), ("260110001", "260111001")])
def test_the_path_has_the_folder_and_the_spelling_of_the_traffic(folder, under):
    revisions = Revisions()
    spelled = "%7B535cb6a4-441f-4e8a-a897-804cd859100e%7D"
    learn(revisions, delta("260101001", "260110001", folder), 0.0, spelled)
    learn(revisions, full("260111001"), 1.0)
    paths = revisions.announced(STREAM, 1.0, within_seconds=DAY, most=1).paths
    assert paths == (f"/content/{spelled}/{under}/xdelta260110001_To_260111001.dax",)


def test_without_a_delta_in_the_traffic_the_folder_is_that_of_other_streams():
    revisions = Revisions()
    other = ContentKey("any", "any", "{B}", "260110001", "xdelta260101001_To_260110001.dax")
    learn(revisions, full("260110001"), 0.0)
    learn(revisions, full("260111001"), 1.0)
    assert revisions.announced(STREAM, 1.0, within_seconds=DAY, most=1).paths[0].split("/")[3] == "260110001"
    learn(revisions, other, 2.0)
    assert revisions.announced(STREAM, 2.0, within_seconds=DAY, most=1).paths[0].split("/")[3] == "260111001"


def test_what_is_remembered_is_bounded():
    revisions = Revisions()
    for number in range(1000):
        learn(revisions, full(f"26010{number:04}"), float(number))
        revisions.learn(("any", "any", str(number)), named(full("260101001")), 0.0)
        learn(revisions, full(f"26010{number:04}"), float(number))
    assert len(list(revisions.streams)) == 50
    assert len(wanted(revisions, 1000.0, most=10_000)[1]) == MAX_REVISIONS - 1


def test_it_is_kept_over_a_restart_and_what_was_learned_since_stays():
    before, after = Revisions(), Revisions()
    learn(before, delta("260101001", "260110001", "260110001"), 5.0, "%7Ba%7D")
    learn(before, delta("260101002", "260110001", "260110001"), 6.0)
    note = json.loads(json.dumps(before.to_json()))
    learn(after, full("260111001"), 7.0)
    after.restore([*note, None, {"stream": 3}, {**note[0], "seen": [["260101003"], 7]}])
    assert wanted(after, 7.0) == ("260111001", ["260110001", "260101002", "260101001"])
    found = after.announced(STREAM, 7.0, within_seconds=DAY, most=1)
    assert found.paths == ("/content/%7Ba%7D/260111001/xdelta260110001_To_260111001.dax",)
    again = Revisions()
    again.restore(json.loads(json.dumps(after.to_json())))
    assert again.to_json() == after.to_json()
    again.restore("nonsense")
    assert again.to_json() == after.to_json()


# --- the list


def wish(number: int = 1, *, by="traffic", kind=Kind.DELTA, new="260110001") -> QueuedFetch:
    key = delta(f"2601{number:05}", new)
    return QueuedFetch(key=key, path=path_of(key), kind=kind, by=by, asked_at=float(number))


def test_an_operator_goes_first_then_who_came_first():
    queue = PrefetchQueue()
    for one in (wish(1), wish(2), wish(3, by="operator"), wish(4, kind=Kind.FULL, by="operator")):
        assert queue.add(one)
    deltas = frozenset({Kind.DELTA})
    order = []
    while (one := queue.due(deltas, 0.0)) is not None:
        order.append(int(one.asked_at))
        queue.move(one, Outcome.FETCHING, 1.0)
        queue.move(one, Outcome.STORED, 2.0)
    assert order == [3, 1, 2]
    assert queue.pending == 1


def test_what_is_to_be_tried_again_waits_for_its_time():
    queue = PrefetchQueue()
    one = wish()
    queue.add(one)
    one.due_at = 5.0
    assert queue.due(frozenset({Kind.DELTA}), 4.0) is None
    assert queue.due(frozenset({Kind.DELTA}), 5.0) is one


def test_a_newer_revision_takes_the_place_of_an_older_one():
    queue = PrefetchQueue()
    old, ordered, new, fetching = wish(1), wish(2, by="operator"), wish(3, new="260111001"), wish(4)
    for one in (old, ordered, new, fetching):
        queue.add(one)
    queue.move(fetching, Outcome.FETCHING, 1.0)
    queue.supersede(("any", "any", "{OTHER}"), "260111001", 2.0)
    assert queue.pending == 4
    queue.supersede(STREAM, "260111001", 2.0)
    assert (old.outcome, old.ended_at, fetching.outcome) == (Outcome.SUPERSEDED, 2.0, Outcome.FETCHING)
    assert ordered.outcome is new.outcome is Outcome.QUEUED


def test_moves_that_make_no_sense_are_our_mistake():
    queue, one = PrefetchQueue(), wish()
    queue.move(one, Outcome.FETCHING, 1.0)
    queue.move(one, Outcome.PRESENT, 1.0)
    with pytest.raises(AssertionError):
        queue.move(one, Outcome.FETCHING, 2.0)


def test_the_list_is_bounded_and_forgets_what_has_ended(monkeypatch):
    monkeypatch.setattr("gup.control.prefetch.MAX_PENDING", 45)
    monkeypatch.setattr("gup.control.prefetch.MAX_QUEUED", 50)
    queue = PrefetchQueue()
    assert all(queue.add(wish(number)) for number in range(45))
    assert not queue.add(wish(45))
    for one in list(queue.rows.values()):
        queue.move(one, Outcome.FETCHING, 1.0)
        queue.move(one, Outcome.ABSENT, 2.0)
    assert all(queue.add(wish(number)) for number in range(45, 70))
    assert len(queue.rows) == 50
    assert queue.pending == 25


def test_the_list_is_kept_and_what_was_being_fetched_is_tried_again():
    queue, after = PrefetchQueue(), PrefetchQueue()
    done, fetching, queued = wish(1), wish(2), wish(3, by="operator")
    for one in (done, fetching, queued):
        queue.add(one)
    for one in (done, fetching):
        queue.move(one, Outcome.FETCHING, 1.0)
    queue.move(done, Outcome.ABSENT, 2.0, "404")
    newer = wish(4)
    after.add(newer)
    rows = json.loads(json.dumps(queue.to_json()))
    after.restore([*rows, {"key": "nonsense"}, 7, {**rows[0], "outcome": "unknown"}])
    found = {int(one.asked_at): (one.outcome, one.by) for one in after.rows.values()}
    assert found == {
        1: (Outcome.ABSENT, "traffic"),
        2: (Outcome.QUEUED, "traffic"),
        3: (Outcome.QUEUED, "operator"),
        4: (Outcome.QUEUED, "traffic"),
    }
    assert next(iter(after.rows.values())).detail == "404"
    assert after.rows.get(newer.key) is newer


def test_folders_have_names_that_are_kept():
    assert [str(folder) for folder in Folder] == ["from", "to"]
