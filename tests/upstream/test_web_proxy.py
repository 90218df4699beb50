"""Failures of a web proxy on the way are reported as such, with the setting that names it."""

import pytest
from harness.processes import free_port
from harness.upstreams import Answer as Scripted

from gup.upstream.exchange import UpstreamFailure, proxy_in_words
from gup.upstream.health import Sign, sign_of
from gup.upstream.session import Ask

PATH = "/content/x.txt"


async def failure_of(pool) -> UpstreamFailure:
    with pytest.raises(UpstreamFailure) as caught:
        await pool.ask(pool.upstreams[0], Ask(PATH, "fill"))
    return caught.value


def proxied(upstream, scheme: str) -> dict:
    proxy = upstream.url.replace("http://", "http://user:tops3cret@")
    return {"name": "manager", "url": f"{scheme}://127.0.0.1:9", "proxy": proxy}


@pytest.mark.parametrize("status", [401, 407, 502, 503])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxys_own_answer_is_told_as_the_proxys(pool_of, upstream, scheme, status):
    """To CONNECT every answer is; to a request that was to be sent on, 407 or one that says so."""
    fields = (("Proxy-Status", "squid; error=connection_refused"),)
    answer = Scripted(b"no", status, fields=fields, reason="Who are you \x1b[2J")
    for target in (f"http://127.0.0.1:9{PATH}", "127.0.0.1:9"):
        upstream.answer(target, answer)
    async with pool_of(proxied(upstream, scheme)) as pool:
        failure = await failure_of(pool)
    assert failure.slug == "upstream-unreachable"
    assert f"the web proxy http://user:***@127.0.0.1:{upstream.port} (upstream.proxy)" in failure.detail
    assert f"answered {status}" in failure.detail
    assert ("wants a user and a password" in failure.detail) == (status in (401, 407))
    assert "tops3cret" not in failure.detail
    assert failure.detail.isprintable()
    assert sign_of(failure, "manager", check=False) is Sign.AWAY


@pytest.mark.parametrize("status", [401, 403, 502])
async def test_an_answer_that_may_be_eithers_names_both(pool_of, upstream, status):
    upstream.answer(f"http://127.0.0.1:9{PATH}", Scripted(b"no", status))
    async with pool_of(proxied(upstream, "http")) as pool:
        failure = await failure_of(pool)
    assert f"manager answered {status}" in failure.detail
    assert "upstream.proxy" in failure.detail
    assert failure.status == status


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_is_not_there_is_told_as_such(pool_of, scheme, host):
    proxy = f"http://{host}:{free_port()}"
    async with pool_of({"name": "manager", "url": f"{scheme}://127.0.0.1:9", "proxy": proxy}) as pool:
        failure = await failure_of(pool)
    assert f"{proxy_in_words(proxy)} can't be reached" in failure.detail


@pytest.mark.parametrize("status", [401, 502])
async def test_without_a_proxy_none_is_named(pool_of, upstream, status):
    upstream.answer(PATH, Scripted(b"no", status, fields=(("Proxy-Status", "x"),)))
    async with pool_of({"name": "manager", "url": upstream.url}) as pool:
        failure = await failure_of(pool)
    assert failure.detail == f"manager answered {status}"
