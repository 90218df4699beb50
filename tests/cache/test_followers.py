"""What a process reads along of a fill that another process leads."""

import asyncio
from dataclasses import replace

from harness.caches import path_of, read, route, working
from harness.content import noise
from harness.upstreams import Answer, Gate

from gup.cache.locks import Claims
from gup.cache.records import CHUNK_BYTES
from gup.content.key import Variant

FILE = path_of("full.dax")
AT = 2 * CHUNK_BYTES
BODY = noise("follow", AT + 5000)


async def test_a_part_of_an_earlier_service_is_not_read_before_its_leader_has_compared_it(
    tmp_path, upstream, until
):
    """A power cut left zeros, in a part that is as long as the body; another process has just claimed it."""
    gate = Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', gates=((AT, gate),)))
    key = route(FILE).key(Variant())
    async with working(tmp_path, [upstream.url]) as before:
        opened = await before.open(FILE)
        await until(lambda: opened.body.available(AT - 1, 1) == 1, "the part has its first bytes")
        opened.body.leave()
    gate.open()
    async with working(tmp_path, [upstream.url]) as now:
        store = now.dependencies.store
        store.service_start = 5.0
        state = store.load_state(key.id)
        part = store.part_path(key.id, state.generation)
        part.write_bytes(BODY[:100] + bytes(len(BODY) - 100))
        leader = Claims(store.partial / "claims")
        assert leader.try_claim(key.claim_offset)
        opening = asyncio.ensure_future(now.open(FILE))
        assert not (await asyncio.wait({opening}, timeout=0.2))[0], "nothing is read of the torn part"
        part.write_bytes(BODY[:AT])
        store.save_state(replace(state, service_start=5.0))
        opened = await opening
        reading = asyncio.ensure_future(read(opened.body))
        part.write_bytes(BODY)
        assert await reading == BODY
        opened.body.leave()
        leader.close()
