"""The pool: who is asked next, what an answer tells of health, loops, and settings that change."""

import asyncio
import socket
from collections import Counter
from contextlib import asynccontextmanager

import pytest
from harness.processes import free_port
from harness.upstreams import Answer as Scripted
from harness.upstreams import Gate

from gup.content.key import Variant
from gup.upstream.exchange import RemoteHead, UpstreamFailure
from gup.upstream.health import Sign, State
from gup.upstream.pool import Answer, rendezvous
from gup.upstream.session import Ask

ANY = Variant()
PATH = "/content/x.txt"
INDEX = "/content/ContentInfo.txt"


def table(name: str, **more: object) -> dict:
    return {"name": name, "url": f"http://127.0.0.1:9/{name}", **more}


def names(found) -> list[str]:
    return [upstream.name for upstream in found]


def down(pool, *which: str) -> None:
    for name in which:
        pool.board.note(name, Sign.AWAY, f"{name} refused")


def is_open(upstream) -> bool:
    return upstream._session is not None


async def whole(answer) -> bytes:
    assert isinstance(answer, Answer)
    got = bytearray()
    try:
        while piece := await answer.read():
            got += piece
    finally:
        answer.close()
    return bytes(got)


# --- choice


async def test_priority_goes_before_weight(pool_of):
    async with pool_of(table("b", priority=1, weight=1000), table("a", priority=0)) as pool:
        for number in range(50):
            assert names(pool.candidates(ANY, f"key {number}")) == ["a", "b"]


async def test_a_wide_variant_asks_those_that_list_the_stream_and_liveupdate_has_its_own(pool_of):
    stream, other = "{535CB6A4-441F-4E8A-A897-804CD859100E}", "{07B590B3-9282-482F-BBAA-6D515D385869}"
    french = {"version": "14.3 RU2", "language": "French"}
    async with pool_of(
        table("fr", **french),
        table("en", version="14.3 RU3", language="English"),
        table("de", version="14.3 RU2", language="German"),
        table("lu", kind="liveupdate"),
    ) as pool:
        pool.lists = lambda name, moniker: moniker == stream and name != "de"

        def asked(variant, of=stream):
            return set(names(pool.candidates(variant, f"any/any/{of}/260801001/full.zip")))

        assert asked(Variant("*", "*")) == {"fr", "en"}
        assert asked(Variant("*", "*"), other) == {"fr", "en", "de"}, "nobody lists it: anybody may have it"
        assert asked(Variant("14.3 RU2", "*")) == {"fr"}
        assert asked(Variant("14.3 RU2", "*"), other) == {"fr", "de"}
        assert asked(Variant(**french)) == {"fr"}
        assert asked(ANY) == {"fr", "en"}, "a key alone: a fill that goes on, or a repair"
        assert asked(Variant("14.3 RU2", "any")) == {"fr"}
        assert asked(Variant("14.3 RU1", "French")) == set(), "never another's"
        assert asked(Variant("any", "French")) == {"fr"}
        assert asked(Variant("14.3 RU2", "French"), "liveupdate") == {"lu"}
        assert asked(ANY, "liveupdate") == {"lu"}
    async with pool_of(table("plain"), table("fr", **french)) as pool:
        assert names(pool.candidates(ANY, f"any/any/{stream}/260801001/full.zip")) == ["plain"]


async def test_another_gup_is_told_whose_content_is_meant(pool_of):
    own = {"headers": {"gup-client-version": "14.3 RU9"}}
    async with pool_of(
        table("gup", kind="gup", version="14.3 RU2", language="French"),
        table("own", kind="gup", version="14.3 RU2", **own),
        table("manager", version="14.3 RU2", language="French"),
    ) as pool:
        sent = {u.name: u.headers(Ask(path=PATH, purpose="fill")) for u in pool.upstreams}
    assert sent["gup"]["GUP-Client-Version"] == "14.3 RU2"
    assert sent["gup"]["GUP-Client-Language"] == "French"
    assert sent["own"]["gup-client-version"] == "14.3 RU9"
    assert "GUP-Client-Version" not in sent["own"].keys() | sent["manager"].keys()


async def test_a_key_prefers_the_same_upstream_in_every_process(pool_of):
    tables = [table("a"), table("b"), table("c", weight=2)]
    async with pool_of(*tables) as one, pool_of(*reversed(tables)) as two:
        firsts = set()
        for number in range(60):
            order = names(one.candidates(ANY, f"key {number}"))
            assert order == names(two.candidates(ANY, f"key {number}"))
            firsts.add(order[0])
        assert firsts == {"a", "b", "c"}


async def test_the_healthy_are_asked_first_and_the_dead_not_at_all(pool_of):
    async with pool_of(table("a"), table("b", priority=1), table("c", priority=2)) as pool:
        pool.board.note("a", Sign.BROKE, "reset")
        assert names(pool.candidates(ANY, "k")) == ["b", "c", "a"]
        down(pool, "b")
        assert names(pool.candidates(ANY, "k")) == ["c", "a", "b"]
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["c", "a"]


async def test_while_all_are_down_one_trial_of_each_goes_out(pool_of, clock):
    async with pool_of(table("a"), table("b", priority=1)) as pool:
        down(pool, "a", "b")
        with pytest.raises(UpstreamFailure) as failure:
            pool.admitted(pool.candidates(ANY, "k"))
        assert failure.value.slug == "upstream-unreachable"
        assert failure.value.retry_after_seconds == pytest.approx(1, abs=0.2)
        with pytest.raises(UpstreamFailure):
            pool.refuse_while_away(ANY, "k")
        clock.ahead_seconds += 1.2
        pool.refuse_while_away(ANY, "k")
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["a", "b"]
        with pytest.raises(UpstreamFailure):
            pool.admitted(pool.candidates(ANY, "another"))
        down(pool, "a", "b")  # so the trials ended
        clock.ahead_seconds += 1.2
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["a", "b"]
        pool.board.note("b", Sign.ANSWERED)
        pool.refuse_while_away(ANY, "k")
        assert names(pool.admitted(pool.candidates(ANY, "another"))) == ["b"]


async def test_another_variant_s_upstream_that_is_up_helps_nobody(pool_of):
    async with pool_of(table("fr", language="French"), table("any")) as pool:
        down(pool, "any")
        with pytest.raises(UpstreamFailure):
            pool.admitted(pool.candidates(ANY, "k"))


async def test_without_checks_requests_try_what_was_down(pool_of, clock):
    first = table("a", health_interval="0")
    async with pool_of(first, table("b", priority=1, health_interval="0")) as pool:
        down(pool, "a")
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["b"]
        clock.ahead_seconds += 1.5
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["a", "b"]
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["b"]
    async with pool_of(table("a"), table("b", priority=1)) as pool:
        down(pool, "a")
        clock.ahead_seconds += 1000
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["b"], "the controller checks it"


async def test_nobody_is_asked_that_the_request_has_passed_through(pool_of):
    async with pool_of(table("a", kind="gup"), table("b", priority=1)) as pool:
        pool.upstreams[0].node = "site-a"
        assert names(pool.candidates(ANY, "k", ("site-x", "site-a"))) == ["b"]
        assert names(pool.candidates(ANY, "k", ("site-x",))) == ["a", "b"]
    async with pool_of(table("a", kind="gup")) as pool:
        pool.upstreams[0].node = "site-a"
        with pytest.raises(UpstreamFailure) as failure:
            pool.candidates(ANY, "k", ("site-a",))
        assert failure.value.slug == "loop"


# --- signs


async def test_resets_of_one_file_take_nothing_away(pool_of, upstream):
    upstream.answer(PATH, Scripted(b"fine"), Scripted(reset_at=-1))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        (one,) = pool.upstreams
        assert await whole(await pool.ask(one, Ask(PATH, "fill"))) == b"fine"
        for _ in range(20):
            with pytest.raises(UpstreamFailure):
                await pool.ask(one, Ask(PATH, "fill", client="10.0.0.1"))
        assert pool.board.get("a").state is State.UP
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["a"]
        upstream.answer(PATH, Scripted(b"fine"))
        assert await whole(await pool.ask(one, Ask(PATH, "fill"))) == b"fine"


NO_WAY = {
    "refused": lambda port, _: {"url": f"http://127.0.0.1:{port}"},
    "no such name": lambda _port, _: {"url": "http://no-such-host.invalid:8014"},
    "proxy": lambda port, _: {"url": "http://127.0.0.1:9", "proxy": f"http://127.0.0.1:{port}"},
    "no TLS": lambda _port, url: {"url": url.replace("http:", "https:"), "connect_timeout": "500ms"},
}


@pytest.mark.parametrize("way", NO_WAY)
async def test_what_no_request_can_cause_takes_it_down_at_once(pool_of, upstream, way):
    async with pool_of({"name": "a", **NO_WAY[way](free_port(), upstream.url)}) as pool:
        with pytest.raises(UpstreamFailure) as failure:
            await pool.ask(pool.upstreams[0], Ask(PATH, "fill", client="10.0.0.1"))
        assert (failure.value.outcome, failure.value.slug) == ("unreachable", "upstream-unreachable")
        assert pool.board.is_down("a")


async def test_no_connection_in_time_takes_it_down_at_once(pool_of):
    """A listener whose queue is full takes no more connections, and refuses none."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        held = [socket.socket() for _ in range(4)]
        try:
            for one in held:
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            url = f"http://127.0.0.1:{full.getsockname()[1]}"
            async with pool_of({"name": "a", "url": url, "connect_timeout": "300ms"}) as pool:
                with pytest.raises(UpstreamFailure) as failure:
                    await pool.ask(pool.upstreams[0], Ask(PATH, "fill", client="10.0.0.1"))
                assert failure.value.outcome == "unreachable"
                assert pool.board.is_down("a")
        finally:
            for one in held:
                one.close()


@pytest.mark.parametrize(
    ("status", "told", "seconds"),
    [(503, "120", 120), (429, "7200", 3600), (503, None, None), (500, "120", None), (403, "9", None)],
)
async def test_retry_after_of_429_and_503_is_taken_in(pool_of, upstream, status, told, seconds):
    fields = (("Retry-After", told),) if told else ()
    upstream.answer(PATH, Scripted(b"", status, fields=fields))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        with pytest.raises(UpstreamFailure) as failure:
            await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
        assert failure.value.retry_after_seconds == seconds


# --- checks


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def checking(pool, clock, seconds):
    """Checks that run, so many seconds later."""
    checks = asyncio.create_task(pool.run_checks())
    await asyncio.sleep(0)
    clock.ahead_seconds += seconds
    try:
        yield
    finally:
        checks.cancel()
        await asyncio.gather(checks, return_exceptions=True)


@pytest.mark.parametrize(
    ("table", "path", "status"),
    [
        ({}, INDEX, 200),
        ({"kind": "liveupdate"}, "/minitri.flg", 302),
        ({"kind": "gup"}, "/", 404),
        ({"health_path": "/a%20b"}, "/a%20b", 503),
    ],
)
async def test_any_answer_to_a_check_says_that_it_lives(pool_of, upstream, clock, table, path, status):
    upstream.answer(path, Scripted(b"", status))
    async with pool_of({"name": "a", "url": upstream.url, **table}) as pool:
        down(pool, "a")
        async with checking(pool, clock, 5):
            await until(lambda: pool.board.get("a").state is State.UP)
        assert {(seen.method, seen.path) for seen in upstream.seen} == {("HEAD", path)}


async def test_a_check_without_an_answer_makes_it_doubtful_and_others_are_asked_first(
    pool_of, upstream, clock
):
    upstream.answer(INDEX, Scripted(reset_at=-1))
    first = {"name": "a", "url": upstream.url}
    async with pool_of(first, table("b", priority=1, health_interval="0")) as pool:
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["a", "b"]
        async with checking(pool, clock, 100):
            await until(lambda: pool.board.get("a").state is State.DOUBTFUL)
            assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["b", "a"]
            upstream.answer(INDEX, Scripted(b"", 500))
            clock.ahead_seconds += 2
            await until(lambda: pool.board.get("a").state is State.UP)


async def test_checks_of_an_interval_of_0_are_none(pool_of, upstream, clock):
    quiet = {"name": "quiet", "url": f"{upstream.url}/quiet", "health_interval": "0"}
    async with pool_of(quiet, {"name": "loud", "url": f"{upstream.url}/loud"}) as pool:
        async with checking(pool, clock, 100):
            await until(lambda: upstream.seen)
        assert {seen.path for seen in upstream.seen} == {f"/loud{INDEX}"}


async def test_checks_that_hang_end_with_their_owner(pool_of, upstream, clock):
    gate = Gate()
    upstream.answer(INDEX, Scripted(b"index", head_gate=gate))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        async with checking(pool, clock, 100):
            await asyncio.to_thread(gate.wait_reached)
        gate.open()


# --- another gup


@pytest.mark.parametrize(("kind", "age"), [("gup", 50), ("manager", 0)])
async def test_the_age_of_what_a_gup_sends_counts(pool_of, upstream, kind, age):
    upstream.answer(PATH, Scripted(b"fine", etag='"e"', fields=(("Age", "50"), ("Via", "1.1 top-1 (gup)"))))
    async with pool_of({"name": "a", "url": upstream.url, "kind": kind}) as pool:
        (one,) = pool.upstreams
        answer = await pool.ask(one, Ask(PATH, "fill"))
        await whole(answer)
        assert answer.head.age_seconds == age
        assert one.node == "top-1"
        same = await pool.ask(one, Ask(PATH, "fill", if_none_match='"e"'))
        assert isinstance(same, RemoteHead)
        assert (same.status, same.age_seconds) == (304, age)


async def test_names_are_learned_before_anything_waits_for_them(pool_of, upstream):
    """Of whatever kind it is set to be: a proxy between has a name that says nothing."""
    upstream.answer("/", Scripted(b"", 404, fields=(("Via", "1.1 top-1 (gup), 1.1 corner (squid)"),)))
    refused = {"name": "b", "url": f"http://127.0.0.1:{free_port()}"}
    async with pool_of({"name": "a", "url": upstream.url}, refused) as pool:
        one, other = sorted(pool.upstreams, key=lambda upstream: upstream.name)
        await asyncio.gather(*(pool.learn_names(ANY, f"k{number}") for number in range(20)))
        assert (one.node, other.node) == ("top-1", None)
        assert len(upstream.seen) == 1
        assert names(pool.candidates(ANY, "k", ("top-1",))) == ["b"]


# --- settings that change


async def test_what_was_down_is_tried_anew_when_its_settings_change(pool_of, upstreams):
    async with pool_of(table("a"), table("b")) as pool:
        down(pool, "a", "b")
        pool.apply(upstreams({**table("a"), "url": "http://127.0.0.1:10"}, table("b")))
        assert (pool.board.get("a").state, pool.board.get("b").state) == (State.UNKNOWN, State.DOWN)
        assert names(pool.admitted(pool.candidates(ANY, "k"))) == ["a"]


async def test_an_old_upstream_that_is_asked_once_more_is_closed_with_the_pool(pool_of, upstream, upstreams):
    upstream.answer(PATH, Scripted(b"fine"))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        (old,) = pool.upstreams
        pool.apply(upstreams({"name": "a", "url": upstream.url, "weight": 2}))
        answer = await pool.ask(old, Ask(PATH, "fill"))
        assert is_open(old)
    assert not is_open(old)
    answer.close()


# --- URLs


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://manager", "https://manager/content/x.txt"),
        ("https://manager:443", "https://manager:443/content/x.txt"),
        ("https://manager:8443/", "https://manager:8443/content/x.txt"),
        ("https://[fd00::1]:8443/sepm", "https://[fd00::1]:8443/sepm/content/x.txt"),
        ("http://manager:8014", "http://manager:8014/content/x.txt"),
    ],
)
async def test_urls_with_the_usual_ports(pool_of, url, asked):
    async with pool_of({"name": "a", "url": url}) as pool:
        assert pool.upstreams[0].url(PATH) == asked


# --- preference


def shares(weights: dict[str, int], keys: int = 6000) -> Counter[str]:
    return Counter(
        max(weights, key=lambda name: rendezvous(f"key {number}", name, weights[name]))
        for number in range(keys)
    )


def test_keys_are_shared_out_by_weight():
    found = shares({"a": 1, "b": 1, "c": 4})
    assert found["a"] == pytest.approx(1000, rel=0.15)
    assert found["b"] == pytest.approx(1000, rel=0.15)
    assert found["c"] == pytest.approx(4000, rel=0.05)


def test_an_upstream_that_goes_moves_its_own_keys_only():
    three, two = {"a": 1, "b": 2, "c": 1}, {"a": 1, "b": 2}
    for number in range(2000):
        key = f"key {number}"
        before = max(three, key=lambda name: rendezvous(key, name, three[name]))
        if before != "c":
            assert max(two, key=lambda name: rendezvous(key, name, two[name])) == before
