"""The pool: who is asked next, what an answer tells of health, loops, and settings that change."""

import asyncio

import pytest
from harness.processes import free_port
from harness.scripted import Answer as Scripted
from harness.scripted import Gate

from gup.content.key import Variant
from gup.upstream.checks import Checks
from gup.upstream.connection import Answer, Ask
from gup.upstream.exchange import RemoteHead, UpstreamFailure, node_names, read_age
from gup.upstream.health import Sign, State
from gup.upstream.pool import sign_of

ANY = Variant()
PATH = "/content/x.txt"
INDEX = "/content/ContentInfo.txt"


def table(name: str, **more: object) -> dict:
    return {"name": name, "url": f"http://127.0.0.1:9/{name}", **more}


def names(found) -> list[str]:
    return [upstream.name for upstream in found]


def down(pool, *which: str) -> None:
    for name in which:
        for _ in range(3):
            pool.board.note(name, Sign.FAILED, f"{name} refused")


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


async def test_other_variants_are_never_asked(pool_of):
    async with pool_of(table("a", language="French"), table("b")) as pool:
        assert names(pool.candidates(ANY, "k")) == ["b"]


async def test_the_healthy_are_asked_first_and_the_dead_not_at_all(pool_of):
    async with pool_of(table("a"), table("b", priority=1), table("c", priority=2)) as pool:
        pool.board.note("a", Sign.FAILED, "reset")
        assert names(pool.candidates(ANY, "k")) == ["b", "c", "a"]
        down(pool, "b")
        assert names(pool.candidates(ANY, "k")) == ["c", "a", "b"]
        assert names(pool.admitted(ANY, "k")) == ["c", "a"]
        asked, reserve = pool.chosen(ANY, "k", None, resuming=False)
        assert (names(asked), names(reserve)) == (["c", "a"], ["b"])
        asked, reserve = pool.chosen(ANY, "k", None, resuming=True)
        assert (names(asked), names(reserve)) == (["c", "a", "b"], [])


async def test_while_all_are_down_one_trial_goes_out_per_error_ttl(pool_of, clock):
    async with pool_of(table("a"), table("b", priority=1)) as pool:
        down(pool, "a", "b")
        with pytest.raises(UpstreamFailure) as failure:
            pool.admitted(ANY, "k")
        assert failure.value.slug == "upstream-unreachable"
        clock.ahead_seconds += 2.2
        assert names(pool.admitted(ANY, "k")) == ["a", "b"]
        with pytest.raises(UpstreamFailure):
            pool.admitted(ANY, "another")
        clock.ahead_seconds += 2.2
        assert names(pool.admitted(ANY, "k")) == ["a", "b"]


async def test_without_checks_requests_try_what_was_down(pool_of, clock):
    first = table("a", health_interval="0")
    async with pool_of(first, table("b", priority=1, health_interval="0")) as pool:
        down(pool, "a")
        assert names(pool.admitted(ANY, "k")) == ["b"]
        clock.ahead_seconds += 1.5
        assert names(pool.admitted(ANY, "k")) == ["a", "b"]
        assert names(pool.admitted(ANY, "k")) == ["b"]
    async with pool_of(table("a"), table("b", priority=1)) as pool:
        down(pool, "a")
        clock.ahead_seconds += 1000
        assert names(pool.admitted(ANY, "k")) == ["b"], "the controller checks it"


async def test_nobody_is_asked_that_the_request_has_passed_through(pool_of):
    async with pool_of(table("a", kind="gup"), table("b", priority=1)) as pool:
        pool.upstreams[0].node = "site-a"
        assert names(pool.admitted(ANY, "k", "1.1 site-x (gup), 1.1 site-a (gup)")) == ["b"]
        assert names(pool.admitted(ANY, "k", "1.1 site-x (gup)")) == ["a", "b"]
    async with pool_of(table("a", kind="gup")) as pool:
        pool.upstreams[0].node = "site-a"
        with pytest.raises(UpstreamFailure) as failure:
            pool.admitted(ANY, "k", "1.1 site-a (gup)")
        assert failure.value.slug == "loop"


# --- signs


def failed(outcome: str = "error", status: int | None = None) -> UpstreamFailure:
    return UpstreamFailure(outcome, "upstream-error", "", again=False, status=status)


@pytest.mark.parametrize(
    ("failure", "kind", "check", "sign"),
    [
        (failed("unreachable"), "manager", False, Sign.FAILED),
        (failed("timeout"), "gup", False, Sign.FAILED),
        (failed(), "manager", False, Sign.FAILED),
        (failed(status=500), "manager", False, Sign.ERRED),
        (failed(status=503), "manager", True, Sign.FAILED),
        (failed(status=501), "manager", True, Sign.GOOD),
        (failed(status=403), "manager", False, Sign.GOOD),
        (failed(status=502), "gup", False, None),
        (failed(status=503), "gup", True, Sign.FAILED),
        (failed(status=508), "gup", True, None),
        (failed("rejected"), "manager", False, None),
    ],
)
def test_what_a_failure_tells(failure, kind, check, sign):
    assert sign_of(failure, kind, check=check) is sign


async def test_answers_and_failures_move_the_health(pool_of, upstream):
    upstream.answer(PATH, Scripted(b"fine"), *[Scripted(reset_at=-1)] * 3, Scripted(b"fine"))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        (one,) = pool.upstreams
        assert await whole(await pool.ask(one, Ask(PATH, "fill"))) == b"fine"
        assert pool.board.get("a").state is State.UP
        for _ in range(3):
            with pytest.raises(UpstreamFailure):
                await pool.ask(one, Ask(PATH, "fill"))
        assert pool.board.get("a").state is State.DOWN
        assert await whole(await pool.ask(one, Ask(PATH, "fill"))) == b"fine"
        assert pool.board.get("a").state is State.RECOVERING


async def test_a_body_that_breaks_off_is_a_bad_sign(pool_of, upstream):
    upstream.answer(PATH, Scripted(b"x" * 100_000, reset_at=50_000))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        answer = await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
        with pytest.raises(UpstreamFailure):
            await whole(answer)
        assert pool.board.get("a").state is State.DOUBTFUL


async def test_a_slow_head_is_noted(pool_of, upstream, clock):
    gate = Gate()
    upstream.answer(PATH, Scripted(b"fine", head_gate=gate))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        asking = asyncio.create_task(pool.ask(pool.upstreams[0], Ask(PATH, "fill")))
        await asyncio.to_thread(gate.wait_reached)
        clock.ahead_seconds += 10
        gate.open()
        assert await whole(await asking) == b"fine"
        assert pool.board.get("a").points == 1


# --- checks


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def test_checks_bring_an_upstream_back_that_answers_twice(pool_of, upstream, clock):
    upstream.answer(INDEX, Scripted(b"oops", 503), Scripted(b"index"))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        down(pool, "a")
        checks = asyncio.create_task(Checks(pool, clock).run())
        try:
            for number in range(1, 4):
                clock.ahead_seconds += 5
                await until(lambda n=number: len(upstream.requests(INDEX, method="HEAD")) >= n)
            await until(lambda: pool.board.get("a").state is State.UP)
        finally:
            checks.cancel()
            await asyncio.gather(checks, return_exceptions=True)
        assert upstream.requests() == []
        assert pool._counters.get("gup_upstream_requests_total", upstream="a", outcome="error") == 1


async def test_checks_of_an_interval_of_0_are_none(pool_of, upstream, clock):
    quiet = {"name": "quiet", "url": f"{upstream.url}/quiet", "health_interval": "0"}
    async with pool_of(quiet, {"name": "loud", "url": f"{upstream.url}/loud"}) as pool:
        checks = asyncio.create_task(Checks(pool, clock).run())
        await asyncio.sleep(0)
        clock.ahead_seconds += 100
        try:
            await until(lambda: upstream.seen)
        finally:
            checks.cancel()
            await asyncio.gather(checks, return_exceptions=True)
        assert {seen.path for seen in upstream.seen} == {f"/loud{INDEX}"}


async def test_checks_that_hang_end_with_their_owner(pool_of, upstream, clock):
    gate = Gate()
    upstream.answer(INDEX, Scripted(b"index", head_gate=gate))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        checks = asyncio.create_task(Checks(pool, clock).run())
        await asyncio.sleep(0)
        clock.ahead_seconds += 100
        await asyncio.to_thread(gate.wait_reached)
        checks.cancel()
        await asyncio.gather(checks, return_exceptions=True)
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
        assert one.node == ("top-1" if kind == "gup" else "")
        same = await pool.ask(one, Ask(PATH, "fill", if_none_match='"e"'))
        assert isinstance(same, RemoteHead)
        assert (same.status, same.age_seconds) == (304, age)


async def test_a_508_is_a_loop(pool_of, upstream):
    upstream.answer(PATH, Scripted(b"", 508))
    async with pool_of({"name": "a", "url": upstream.url, "kind": "gup"}) as pool:
        with pytest.raises(UpstreamFailure) as failure:
            await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
        assert failure.value.slug == "loop"


def test_fields_that_others_wrote_are_read_with_care():
    assert [read_age(text) for text in (None, "", "7", "-7", "7.5", "x", "9" * 12)] == [
        *(0, 0, 7, 0, 0, 0),
        1 << 31,
    ]
    assert node_names(None) == []
    assert node_names("1.1 a (gup), 1.0 fred, HTTP/1.1 p.example.net:80 (x), ") == [
        "a",
        "fred",
        "p.example.net:80",
    ]


# --- settings that change


async def test_a_changed_upstream_is_replaced_and_ends_what_it_began(pool_of, upstream, upstreams):
    gate = Gate()
    upstream.answer(PATH, Scripted(b"x" * 100_000, gates=((50_000, gate),)))
    changed = {"name": "a", "url": upstream.url, "headers": {"X-Site": "2"}}
    same = {"name": "b", "url": f"http://127.0.0.1:{free_port()}", "priority": 1}
    async with pool_of({"name": "a", "url": upstream.url}, same) as pool:
        old, kept = pool.upstreams
        answer = await pool.ask(old, Ask(PATH, "fill"))
        pool.apply(upstreams(changed, same))
        new, kept_now = pool.upstreams
        assert (new is old, kept_now is kept) == (False, True)
        assert old.is_open
        gate.open()
        assert await whole(answer) == b"x" * 100_000
        await until(lambda: not old.is_open)
        upstream.answer(PATH, Scripted(b"new"))
        assert await whole(await pool.ask(new, Ask(PATH, "fill"))) == b"new"
        assert upstream.requests(PATH)[-1].header("x-site") == "2"


async def test_what_was_down_is_tried_anew_when_its_settings_change(pool_of, upstreams):
    async with pool_of(table("a"), table("b")) as pool:
        down(pool, "a", "b")
        pool.apply(upstreams({**table("a"), "url": "http://127.0.0.1:10"}, table("b")))
        assert (pool.board.get("a").state, pool.board.get("b").state) == (State.UNKNOWN, State.DOWN)
        assert names(pool.admitted(ANY, "k")) == ["a"]


async def test_an_old_upstream_that_is_asked_once_more_is_closed_with_the_pool(pool_of, upstream, upstreams):
    upstream.answer(PATH, Scripted(b"fine"))
    async with pool_of({"name": "a", "url": upstream.url}) as pool:
        (old,) = pool.upstreams
        pool.apply(upstreams({"name": "a", "url": upstream.url, "weight": 2}))
        answer = await pool.ask(old, Ask(PATH, "fill"))
        assert old.is_open
    assert not old.is_open
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
