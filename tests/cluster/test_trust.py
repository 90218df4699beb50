"""Who gets nothing: what was written into the engine without the secret, and who is at a member's address."""

import contextlib
import socket
from pathlib import Path
from urllib.parse import quote

import pytest
from cluster.nodes import SECRET, SITE, Node, until
from cluster.relay import Relay
from cluster.services import PASSWORD, UNLIMITED, loaded, other_clock, owned_by, running
from cluster.test_one_fetch import bodies, herd
from harness.clients import fetch, readable, send_raw
from harness.content import CONTENT_INFO, INDEX
from harness.processes import free_port
from harness.processes import until as wait_until
from harness.upstreams import Answer, RawUpstream

from gup.cluster.signing import Signer

ROWS = "gup:{lyon}:members"


@contextlib.asynccontextmanager
async def nodes(valkey, *names):
    made = [Node(name, valkey.port) for name in names]
    for node in made:
        await node.start()
    await until(lambda: all(len(node.asks) == len(names) - 1 for node in made), "all ask all")
    try:
        yield made
    finally:
        for node in made:
            await node.die()


async def test_a_row_that_no_member_has_signed_gets_no_request(valkey):
    """It names a port where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with nodes(valkey, "a", "b") as made:
            with valkey.client() as client:
                port, sealed = listening.getsockname()[1], client.get(f"{ROWS}:b")
                text = sealed.partition(" ")[2].replace('"b"', '"c"').replace(str(made[1].port), str(port))
                assert f":{port}" in text
                forged = {
                    "c1": text.replace('"c"', '"c1"'),
                    "c2": sealed.partition(" ")[0] + " " + text.replace('"c"', '"c2"'),
                    "c3": Signer(SITE, (b"another-secret-of-it",)).seal(
                        "row of c3", text.replace('"c"', '"c3"')
                    ),
                    "c4": Signer("paris", (SECRET,)).seal("row of c4", text.replace('"c"', '"c4"')),
                    "c5": Signer(SITE, (SECRET,)).seal("order", text.replace('"c"', '"c5"')),
                    "c6": Signer(SITE, (SECRET,)).seal("row of c5", text.replace('"c"', '"c6"')),
                    "c7": Signer(SITE, (SECRET,)).seal("row of c7", text),
                }
                for name, row in forged.items():
                    client.zadd(ROWS, {name: 9e15})
                    client.set(f"{ROWS}:{name}", row)
            for node in made:
                await until(lambda node=node: node.control.forged >= len(forged), "all are seen")
                assert len(node.lists) == 1
                assert "row-forged" in node.alarms
        assert not readable(listening, 0)


async def test_an_old_row_of_a_member_that_is_gone_gets_no_more_than_a_probe(valkey):
    """Somebody writes it again and again, and listens where the member was."""
    async with nodes(valkey, "a", "b") as (one, two):
        with valkey.client() as client:
            row = client.get(f"{ROWS}:b")
            await two.die()
            await until(lambda: not one.asks, "it is not asked any more")
            with RawUpstream(port=two.port) as listener:
                listener.reply = lambda request: request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

                def probed():
                    client.zadd(ROWS, {"b": 9e15})
                    client.set(f"{ROWS}:b", row, px=600)
                    return listener.seen

                await until(probed, "it is probed")
                assert one.asks == set()
                assert {request.path for request in listener.seen} == {"/readyz"}


def test_who_has_a_member_s_address_is_no_member(tmp_path):
    """With what a member has asked: at its port, at another's, and at the port of clients."""
    ports = {name: free_port() for name in "ab"}
    with running(tmp_path) as site, Relay(ports["b"], members=True) as relay:
        site.start(
            "a",
            settings=UNLIMITED,
            address=f"http://127.0.0.1:{ports['a']}",
            listen=f"127.0.0.1:{ports['a']}",
        )
        site.start(
            "b",
            settings=UNLIMITED,
            address=f"http://127.0.0.1:{relay.port}",
            listen=f"127.0.0.1:{ports['b']}",
        )
        wait_until(site.all_ask_all, "both ask each other", 30)
        (path, body), (other, _) = owned_by("b", 2, 100_000, names="ab").items()
        site.upstream.answer(path, Answer(body, etag='"a"'))
        site.nodes["a"].serves(path, body)
        stream, another = (each.partition("{")[2].partition("}")[0].encode() for each in (path, other))
        (question,) = [head for head in relay.heads if stream in head]
        assert b"\r\ngup-signature: " in question.lower()
        before = {name: site.nodes[name].metric("gup_peer_sent_bytes_total") for name in ports}
        bare = f"GET {path} HTTP/1.1\r\nHost: gup\r\n\r\n".encode()
        tries = [("b", bare), ("b", question.replace(stream, another)), ("a", question)]
        for name, text in tries:
            answer = send_raw(("127.0.0.1", ports[name]), text)
            assert answer.status == 403
            assert body not in answer.body
        fields = dict(line.split(": ", 1) for line in question.decode().split("\r\n")[1:-2])
        answer = fetch(
            site.nodes["b"].data, path, {n: v for n, v in fields.items() if n.lower().startswith("gup-")}
        )
        assert (answer.status, answer.body) == (200, body)  # a client like any other
        assert not [name for name, _ in answer.fields if name.startswith("gup-")]
        assert {name: site.nodes[name].metric("gup_peer_sent_bytes_total") for name in ports} == before
        assert len(site.upstream.requests()) == 1


@pytest.mark.long
def test_no_worker_knows_the_engine_s_password(tmp_path):
    """Neither its environment nor its command line nor its memory, so that no core file has it either."""
    own = {"PYTHONDONTWRITEBYTECODE": "1"}  # interpreters of their own
    with running(tmp_path) as site:
        for name in "ab":
            site.start(name, settings=UNLIMITED, env=own)
        wait_until(site.all_ask_all, "both ask each other", 30)
        with loaded(site):
            for node in site.nodes.values():
                assert all(not knows(pid, PASSWORD) for pid in node.workers())
                (controller,) = set(node.children()) - set(node.workers())
                assert knows(controller, PASSWORD), "it would be found"
                for pid in node.pids:
                    for file in ("environ", "cmdline"):
                        assert PASSWORD.encode() not in Path(f"/proc/{pid}/{file}").read_bytes()


def knows(pid, text):
    """Whether the process has this in its memory."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            start, stop = (int(end, 16) for end in span.split("-"))
            if rights.startswith("rw"):
                memory.seek(start)
                with contextlib.suppress(OSError):  # a page that nobody may read
                    if text.encode() in memory.read(stop - start):
                        return True
    return False


@pytest.mark.long
def test_clocks_that_are_ten_minutes_wrong_change_nothing(tmp_path):
    """Of the nodes: one ahead, one behind. One fetch a file, and a purge holds at all of them."""
    settings = {**UNLIMITED, "cache": {"index_ttl": "2s"}}
    with running(tmp_path) as site:
        for name, seconds in {"a": 600, "b": -600, "c": 0}.items():
            site.start(name, settings=settings, env=other_clock(tmp_path / f"clock {name}", seconds))
        wait_until(site.all_ask_all, "all ask all", 30)
        site.upstream.answer(INDEX, Answer(CONTENT_INFO, etag='"a"'))
        made = bodies(12, 50_000, 1_000_000)
        for path, body in made.items():
            site.upstream.answer(path, Answer(body, etag='"a"'))
        herd(site, made, 60)
        assert {path: len(site.upstream.requests(path)) for path in made} == dict.fromkeys(made, 1)
        new = {path: body[::-1] for path, body in made.items()}
        for path, body in new.items():
            site.upstream.answer(path, Answer(body, etag='"b"'))
        for node in site.nodes.values():
            for path in made:
                key = quote(f"any/any{path.removeprefix('/content')}")
                assert node.api(f"/api/v1/content/{key}", "DELETE")[1]["unconfirmed"] == []
            herd(site, new, 0)
        assert {path: len(site.upstream.requests(path)) for path in made} == dict.fromkeys(made, 4)
        with loaded(site):
            for node in site.nodes.values():
                node.serves(INDEX, CONTENT_INFO)
        for name in ("a", "b"):
            assert site.nodes[name].stop() == 0
            site.nodes[name].start()
        wait_until(site.all_ask_all, "all ask all", 30)
        herd(site, new, 0)
        assert {path: len(site.upstream.requests(path)) for path in made} == dict.fromkeys(made, 4)
        assert site.quiet("member-unreachable")
