"""A service and its connections to upstream: a client's pause, an end that nobody told, a trickle."""

import time

from harness.clients import assert_problem
from harness.content import content_path, noise, zip_of
from harness.processes import until
from harness.upstreams import Over, RawUpstream, Request, ok

DELTA = "xdelta260801001_To_260801002.dax"
EACH = {"connect_timeout": "5s", "read_timeout": "1s", "health_interval": "0s"}


def path_of(number: int, file: str = "full.dax") -> str:
    return content_path(file, revision=f"26{number // 100 + 1:02}{number % 100 + 1:02}001")


def test_a_client_that_pauses_is_not_upstreams_silence(serve):
    """The body is passed through at the client's pace: it stops for longer than read_timeout."""
    body = noise("pass", 8_000_000)
    upstream = RawUpstream(lambda talk: talk.send(ok(body)))
    gup, _ = serve(
        before=upstream, workers=1, each=EACH | {"read_timeout": "500ms"}, cache={"max_size": "1MB"}
    )
    client, response = gup.begin(path_of(1), 100_000)
    time.sleep(1.0)  # the case itself
    assert client.finish(response).body == body


def test_an_unsure_end_is_passed_on_as_one_and_told(serve):
    bodies = {"dax": noise("unsure", 500_000), "zip": zip_of("unsure", 500_000)}

    def answer(talk: Request) -> None:
        talk.send(b"HTTP/1.0 200 OK\r\n\r\n" + (bodies[talk.path[-3:]] if talk.method == "GET" else b""))
        raise Over

    gup, _ = serve(before=RawUpstream(answer), workers=1, each=EACH)
    for number, file in enumerate((DELTA, "full.dax", "full.zip")):
        for version in ("HTTP/1.1", "HTTP/1.0"):
            path = path_of(2 * number + (version == "HTTP/1.0"), file)
            client = gup.connect()
            client.ask(path, version=version)
            response = client.response()
            assert response.status == 200
            assert response.complete is False, "no clean end where the end is not known"
            assert bodies[path[-3:]].startswith(response.body)
            until(lambda: not gup.parts(), "its part is gone")
            assert_problem(gup.get(path), 502, "upstream-unsure-end")
    assert gup.bodies() == {}
    gup.wait_log("closed the connection, without a Content-Length")
    (alarm,) = until(lambda: gup.alarms("unsure-end"), "the alarm stands")
    assert alarm["text"].startswith("u0 sent 500000 bytes")


def test_a_trickle_gives_its_slot_to_others(serve):
    """A byte per 0.1 s, and one slot for fulls: the next full has it when the trickle is found out."""

    def answer(talk: Request) -> None:
        if not talk.path.endswith("full.zip"):
            talk.send(ok(b"another full"))
            return
        talk.send(ok(noise("t", 100_000))[:20_000])
        while True:
            talk.send(b"x")
            talk.pause(0.1)

    each = EACH | {"read_timeout": "500ms", "min_rate": "1kB/s"}
    gup, _ = serve(before=RawUpstream(answer), workers=1, each=each, fill={"max": 1, "queue_timeout": "20s"})
    client, _ = gup.begin(path_of(1, "full.zip"))
    began = time.monotonic()
    gup.serves(path_of(2), b"another full")
    assert time.monotonic() - began < 15
    assert len(client.read(10)) == 10, "whoever reads the trickle still does"
