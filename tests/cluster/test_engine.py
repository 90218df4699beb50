"""The client of the engine: time limits, answers of others, Sentinel. Real servers."""

import asyncio
import time

import pytest
from cluster.engines import redis_with_tls, replicated
from cluster.nodes import Node, until
from harness.upstreams import Authority

from gup.cluster.beat import EngineError
from gup.cluster.engine import CALL_SECONDS, Engine
from gup.config import Cluster


def settings(port, **more):
    values = {"url": f"redis://127.0.0.1:{port}/0", "site": "s", "node": "a", "address": "http://a:1"}
    return Cluster.model_validate(values | {"secret_file": "/unused"} | more)


async def beat(engine):
    return await engine.beat("a", "row", start=1, rate=100, demand=(0, 0, 0), grant=0)


async def test_a_call_that_takes_too_long_has_failed_and_the_next_one_is_right(valkey):
    engine = Engine(settings(valkey.port))
    assert (await beat(engine)).rows == {"a": "row"}
    with valkey.paused():
        began = time.monotonic()
        with pytest.raises(EngineError, match="in time"):
            await beat(engine)
        assert time.monotonic() - began >= CALL_SECONDS
    assert (await beat(engine)).rows == {"a": "row"}
    with valkey.client() as client:
        client.script_flush()
        assert (await beat(engine)).rows == {"a": "row"}
        client.set("gup:{s}:grants", "no hash")
    with pytest.raises(EngineError, match="WRONGTYPE"):
        await beat(engine)
    await engine.close()


async def test_who_is_cancelled_ends_at_whatever_moment(valkey):
    """asyncio.wait_for, which redis uses, loses some cancellations before Python 3.12."""
    engine = Engine(settings(valkey.port))

    async def ask_on():
        while True:
            await beat(engine)

    for turns in range(60):
        asking = asyncio.create_task(ask_on())
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking}, timeout=0.5)
        assert asking.cancelled(), turns
    await engine.close()


async def test_what_is_no_engine_is_told(unused_port_of_a_talker):
    engine = Engine(settings(unused_port_of_a_talker))
    with pytest.raises(EngineError):
        await beat(engine)
    await engine.close()


@pytest.fixture
async def unused_port_of_a_talker():
    """A server of something else."""

    async def talk(_reader, writer):
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


@pytest.fixture
def with_tls(tmp_path):
    """Its port, and the file of its authority."""
    authority = Authority(tmp_path / "tls")
    redis = redis_with_tls(tmp_path / "redis", authority, "the-password")
    (tmp_path / "password").write_text("the-password\n")
    yield redis.port, authority.ca
    redis.kill()


@pytest.mark.needs("redis")
async def test_with_tls_only_a_certificate_of_the_right_authority_and_name_will_do(with_tls, tmp_path):
    port, ca = with_tls
    tries = [("127.0.0.1", ca, None), ("localhost", ca, "certificate"), ("127.0.0.1", None, "certificate")]
    for host, file, error in tries:
        more = {"url": f"rediss://{host}:{port}", "password_file": str(tmp_path / "password")}
        engine = Engine(settings(port, **more, **({"ca_file": str(file)} if file else {})))
        if error is None:
            assert (await beat(engine)).rows == {"a": "row"}
        else:
            with pytest.raises(EngineError, match=error):
                await beat(engine)
        await engine.close()


@pytest.fixture
def engines(tmp_path):
    with replicated(tmp_path / "engines") as started:
        yield started


async def test_a_failover_by_sentinel_is_followed(engines):
    one = Node("a", engines.first.port, **engines.settings)
    await one.start()
    try:
        await until(lambda: one.control.beats > 3, "it beats at the primary", 30)
        engines.first.kill()
        await until(lambda: one.control.engine_error, "it is away", 30)
        before = one.control.beats
        await until(lambda: one.control.beats > before + 3, "it beats at the replica", 60)
        assert one.control.engine_error is None
    finally:
        await one.die()
