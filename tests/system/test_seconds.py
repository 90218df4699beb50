"""Where the seconds went, beside a real service: of fills, of slow requests, by key and by client."""

import threading
import time
from urllib.parse import quote

import pytest
from harness.clients import RawConnection
from harness.commands import command
from harness.content import content_path, noise, zip_of
from harness.faults import planned
from harness.processes import until
from harness.upstreams import Answer, Gate

SLOW = 0.2
SHARED = {
    "reports": {"slow": f"{int(1000 * SLOW)}ms"},
    "fill": {"max": 1},
    "wan": {"rate": "2MB/s"},
}
HELD = 0.5
"""So long something is held up; what is measured may be longer on a busy machine, never shorter."""
LATE = 1.0
"""So much later than the client, or earlier, a process of a busy machine may look at its clock."""


def known(gup, path):
    (file,) = gup.api(f"/api/v1/why?of={quote(path)}")[1]["files"]
    return file


def ended(gup, path, requests=1):
    """What is known of the file once its fill and so many slow requests have ended."""

    def look():
        file = known(gup, path)
        over = [one for one in file["slow"] if one["at"] is not None and "fill" not in one["phases"]]
        times = file["times"]
        return file if times is not None and times["at"] is not None and len(over) >= requests else None

    file = until(look, f"the times of {path} are known")
    for one in (file["times"], *file["slow"]):
        adds_up(one)
    return file


def adds_up(spell):
    assert sum(spell["phases"].values()) == pytest.approx(spell["seconds"], rel=0.01), spell


def timed(ask):
    began = time.monotonic()
    answer = ask()
    return answer, time.monotonic() - began


class Asking(threading.Thread):
    """A client that asks in the background."""

    def __init__(self, ask):
        super().__init__()
        self._ask = ask
        self.start()

    def run(self):
        self.answer, self.seconds = timed(self._ask)


def hold(gate):
    gate.wait_reached()
    time.sleep(HELD)
    gate.open()


def test_an_upstream_that_is_slow_with_the_head(shared):
    gup, upstream = shared
    path, gate = content_path("head.zip"), Gate()
    upstream.answer(path, Answer(zip_of("head", 50_000), etag='"h"', head_gate=gate))
    client = Asking(lambda: gup.get(path))
    hold(gate)
    client.join()
    file = ended(gup, path)
    (request,) = file["slow"]
    assert request["client"] == "127.0.0.1"
    for one in (file["times"], request):
        assert one["phases"]["head"] >= HELD
        assert one["seconds"] <= client.seconds + LATE
    assert request["seconds"] >= client.seconds - LATE
    assert "for the upstream's answer" in request["said"]
    told = command("why", "127.0.0.1", "--admin", gup.admin_url)
    assert (told.returncode, request["key"] in told.stdout) == (0, True), told
    assert gup.metric("gup_fill_phase_seconds_sum", phase="head") >= HELD
    until(lambda: gup.metric("gup_request_phase_seconds_sum", phase="head") >= HELD, "it is counted")
    assert f"head_seconds={request['phases']['head']:.6g}" in gup.log


def test_an_upstream_that_trickles(shared):
    gup, upstream = shared
    path = content_path("trickle.zip")
    upstream.answer(path, Answer(zip_of("t", 130_000), etag='"t"', piece_seconds=HELD / 4))
    client = Asking(lambda: gup.get(path))
    client.join()
    file = ended(gup, path)
    for one in (file["times"], *file["slow"]):
        assert one["phases"]["receiving"] >= 0.6 * HELD
        assert max(one["phases"], key=one["phases"].get) == "receiving"


def test_the_rate_of_the_wan(shared):
    gup, upstream = shared
    path, body = content_path("wan.zip"), zip_of("wan", 1_200_000)
    upstream.answer(path, Answer(body, etag='"w"'))
    client = Asking(lambda: gup.get(path))
    client.join()
    file = ended(gup, path)
    for one in (file["times"], *file["slow"]):
        assert one["phases"]["wan"] >= 0.1
        assert one["seconds"] <= client.seconds + LATE


def test_the_queue_for_fill_slots_and_behind_whom(shared):
    gup, upstream = shared
    first, second, gate = content_path("first.zip"), content_path("second.zip"), Gate()
    upstream.answer(first, Answer(zip_of("first", 50_000), etag='"1"', head_gate=gate))
    upstream.answer(second, Answer(zip_of("second", 50_000), etag='"2"'))
    one = Asking(lambda: gup.get(first))
    gate.wait_reached()
    two = Asking(lambda: gup.get(second))
    running = until(
        lambda: (known(gup, second)["times"] or {}).get("behind", {}).get("queue"), "it is seen in the queue"
    )
    assert running == [known(gup, first)["times"]["key"]]
    gate.open()
    one.join()
    two.join()
    file = ended(gup, second)
    for spell in (file["times"], *file["slow"]):
        assert spell["behind"]["queue"] == running
        assert spell["phases"]["queue"] > spell["phases"].get("head", 0)
    assert "for a fill slot (fill.max) behind" in file["slow"][0]["said"]
    assert file["slow"][0]["seconds"] <= two.seconds + LATE


def test_a_follower_in_the_other_worker(shared):
    gup, upstream = shared
    path, gate = content_path("both.zip"), Gate()
    upstream.answer(path, Answer(zip_of("both", 50_000), etag='"b"', head_gate=gate))
    here, there = (gup.connect_to(pid) for pid in gup.workers())
    here.ask(path)
    gate.wait_reached()
    there.ask(path)
    gup.wait_metric(2, "gup_fill_waiters")
    hold(gate)
    assert here.response().complete
    assert there.response().complete
    file = ended(gup, path, 2)
    assert [one["phases"]["head"] >= HELD for one in file["slow"]] == [True, True]


def test_a_client_that_reads_slowly(serve):
    path, body = content_path("slow-client.zip"), zip_of("slow", 12_000_000)
    gup, _ = serve({path: Answer(body, etag='"s"')}, workers=1, reports={"slow": "200ms"})
    gup.serves(path, body)
    with RawConnection(gup.data, receive_buffer_bytes=4096, source="127.0.0.7") as client:
        response = client.begin(path, 1000)
        time.sleep(HELD)
        assert client.finish(response).body == body

    def slow():
        found = gup.api("/api/v1/why?of=127.0.0.7")[1]["slow"]
        return found if found and found[0]["at"] is not None else None

    (spell,) = until(slow, "the slow client is known")
    adds_up(spell)
    assert spell["phases"]["client"] >= 0.8 * HELD
    assert "for the client to take more" in spell["said"]


def test_a_client_that_leaves_while_it_waits(shared):
    gup, upstream = shared
    path, gate = content_path("left.zip"), Gate()
    upstream.answer(path, Answer(zip_of("left", 50_000), etag='"l"', head_gate=gate))
    with RawConnection(gup.data, source="127.0.0.8") as client:
        client.ask(path)
        gate.wait_reached()
        (running,) = until(lambda: gup.api("/api/v1/why?of=127.0.0.8")[1]["slow"], "it is seen to wait")
        assert (running["at"], "head" in running["phases"]) == (None, True)
    gate.open()

    def left():
        found = gup.api("/api/v1/why?of=127.0.0.8")[1]["slow"]
        return [one for one in found if one["at"] is not None]

    (spell,) = until(left, "that it left is known")
    adds_up(spell)


def test_a_fill_that_is_resumed(shared):
    gup, upstream = shared
    path, body, gate = content_path("resumed.zip"), zip_of("resumed", 500_000), Gate()
    again = Answer(body, etag='"r"', head_gate=gate)
    upstream.answer(path, Answer(body, etag='"r"', cut_after=200_000), again)
    client = Asking(lambda: gup.get(path))
    hold(gate)
    client.join()
    assert client.answer.body == body
    file = ended(gup, path)
    assert file["fetched"]["resumes"] >= 1
    for one in (file["times"], *file["slow"]):
        assert one["phases"]["head"] >= HELD, "the wait for the rest counts as one for the upstream"


def test_a_fill_that_fails(shared):
    gup, upstream = shared
    path, gate = content_path("fails.zip"), Gate()
    upstream.answer(path, Answer(status=500, head_gate=gate))
    client = Asking(lambda: gup.get(path))
    hold(gate)
    client.join()
    assert client.answer.status >= 500
    file = ended(gup, path)
    for one in (file["times"], *file["slow"]):
        assert one["phases"]["head"] >= HELD
    assert "(failed)" in file["times"]["said"]


def test_what_is_answered_at_once_is_not_slow(shared):
    gup, upstream = shared
    path, body = content_path("quick.zip"), zip_of("quick", 20_000)
    upstream.answer(path, Answer(body, etag='"q"'))
    with RawConnection(gup.data, source="127.0.0.9") as client:
        answers = [timed(lambda: client.get(path)) for _ in range(3)]
    assert all(answer.body == body for answer, _ in answers)
    file = ended(gup, path, 0)
    if max(seconds for _, seconds in answers) >= SLOW:
        return  # a busy machine
    assert file["slow"] == []
    assert gup.api("/api/v1/why?of=127.0.0.9")[1]["slow"] == []


def test_a_wrong_address_is_told_so(shared):
    gup, _ = shared
    assert gup.api("/api/v1/why?of=h-0123456789abcdef")[0] == 404
    assert gup.api("/api/v1/why?of=10.0.0.1")[1] == {"files": [], "client": "10.0.0.1", "slow": []}
    assert gup.api("/api/v1/why?of=10.0.0.300")[0] == 400
    assert gup.api("/api/v1/why?of=::ffff:10.0.0.1")[1]["client"] == "10.0.0.1"


@pytest.mark.long
def test_the_download_queue_and_the_rate_of_clients(serve):
    path, body = content_path("full.zip"), zip_of("full", 1_000_000)
    large = content_path("full.zip", revision="260801002")
    gup, _ = serve(
        {path: Answer(body, etag='"f"'), large: Answer(zip_of("large", 8_000_000), etag='"l"')},
        workers=1,
        reports={"slow": "200ms"},
        clients={"max_downloads": 1, "rate": "2MB/s"},
    )
    with RawConnection(gup.data, source="127.0.0.2") as one, RawConnection(gup.data) as two:
        for client in (one, two):
            client.ask(path)
        assert [client.response().complete for client in (one, two)] == [True, True]

    def slow(address):
        return [row for row in gup.api(f"/api/v1/why?of={address}")[1]["slow"] if row["at"] is not None]

    found = until(lambda: (both := [slow("127.0.0.2"), slow("127.0.0.1")]) and all(both) and both, "both")
    spells = [one for rows in found for one in rows]
    for one in spells:
        adds_up(one)
        assert one["phases"]["rate"] >= 0.2
    (queued,) = [one for one in spells if one["phases"].get("download_queue", 0) > 0.2]
    (other,) = [one["client"] for one in spells if one is not queued]
    assert queued["behind"]["download_queue"] == [other]
    with RawConnection(gup.data, source="127.0.0.2") as one:
        one.begin(large, 1)
        with RawConnection(gup.data, source="127.0.0.3") as two:
            two.ask(path)
            running = until(lambda: gup.api("/api/v1/why?of=127.0.0.3")[1]["slow"], "it is seen in the queue")
            assert "for a download slot (clients.max_downloads) behind 127.0.0.2" in running[0]["said"]
    (left,) = until(lambda: slow("127.0.0.3"), "that it left the queue is known")
    adds_up(left)
    assert "broken off" in left["said"]


@pytest.mark.long
def test_a_disk_that_is_slow(serve):
    path, body = content_path("disk.zip"), zip_of("disk", 3_000_000)
    slow = planned({"call": "rename", "path": "content/*/*/*/*/*", "do": f"sleep:{HELD}"})
    gup, _ = serve({path: Answer(body, etag='"d"')}, workers=1, env=slow, reports={"slow": "200ms"})
    client = Asking(lambda: gup.get(path))
    client.join()
    file = ended(gup, path)
    for one in (file["times"], *file["slow"]):
        assert one["phases"]["disk"] >= 0.9 * HELD
        assert one["seconds"] <= client.seconds + 0.1
    assert "for the disk" in file["times"]["said"]


@pytest.mark.long
def test_they_survive_a_power_cut_and_hashed_names(serve):
    path, gate = content_path("kept.zip"), Gate()
    settings = {"reports": {"slow": "100ms"}}
    gup, upstream = serve({}, workers=1, **settings)
    upstream.answer(path, Answer(noise("kept", 10_000), etag='"k"', head_gate=gate))
    client = Asking(lambda: gup.get(path))
    hold(gate)
    client.join()
    ended(gup, path)
    time_then = known(gup, path)["slow"][0]["seconds"]
    gup.kill()
    gup.start()
    file = until(lambda: (found := known(gup, path)) and found["slow"] and found, "it is known again")
    assert (file["slow"][0]["seconds"], file["times"]["phases"]["head"] >= HELD) == (time_then, True)
    gup.rewrite({"reports": {"slow": "100ms", "addresses": "hashed"}})
    until(lambda: known(gup, path)["slow"][0]["client"].startswith("h-"), "the client is renamed")
    answer = gup.api("/api/v1/why?of=127.0.0.1")[1]
    assert answer["client"] == known(gup, path)["slow"][0]["client"]
    assert [one["seconds"] for one in answer["slow"]] == [time_then]
    gup.rewrite({"reports": {"slow": "100ms", "addresses": "off"}})
    until(lambda: gup.api("/api/v1/why?of=127.0.0.1")[0] == 404, "clients are not known any more")
    until(lambda: known(gup, path)["slow"][0]["client"] is None, "its name is gone, its times stay")
