"""Fills outlive the death of all processes: only the rest is fetched, whatever a power cut left of a part."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.content import content_path, noise, zip_of
from harness.internals import Routes, Variant
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate, ScriptedUpstream

CHUNK_BYTES = 1 << 20
OVERLAP_BYTES = 64 * 1024
READ_AHEAD_BYTES = 2 << 20
"""What may have come and is dropped when a comparison ends a fetch: twice aiohttp's limit."""
LENGTH = 5_000_000
AT = LENGTH * 6 // 10
SURE = AT // CHUNK_BYTES * CHUNK_BYTES
"""Up to here the part's sums vouch for it."""


@dataclass(frozen=True)
class Left:
    """What a fill that died left in `partial/`."""

    part: Path
    sums: Path
    state: Path


def overwrite(path: Path, at: int, piece: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(piece)


def a_second_part(left: Left) -> None:
    """Of an older generation, as a takeover leaves it that died before it dropped the damaged one."""
    id_, generation, _ = left.part.name.split(".")
    left.part.with_name(f"{id_}.{int(generation) - 5}.part").write_bytes(bytes(1_000_000))


Damage = tuple[Callable[[Left], object], int, str]
DAMAGES: dict[str, Damage] = {
    "nothing": (lambda _: None, SURE, ""),
    "garbage at the end": (lambda left: overwrite(left.part, AT, noise("garbage", 300_000)), SURE, "part"),
    "zeros at the end": (lambda left: overwrite(left.part, AT - 200_000, bytes(200_000)), SURE, "part"),
    "zeros between": (
        lambda left: overwrite(left.part, 4096 + CHUNK_BYTES, bytes(4096)),
        CHUNK_BYTES,
        "part",
    ),
    "truncated": (lambda left: os.truncate(left.part, AT - 1_500_000), CHUNK_BYTES, ""),
    "longer than the body is": (lambda left: os.truncate(left.part, LENGTH + 1000), SURE, "part"),
    "no sums": (lambda left: left.sums.unlink(), 0, ""),
    "torn sums": (lambda left: os.truncate(left.sums, 11), CHUNK_BYTES, ""),
    "no state file": (lambda left: left.state.unlink(), 0, ""),
    "torn state": (lambda left: os.truncate(left.state, 200), 0, "state"),
    "state of zeros": (lambda left: left.state.write_bytes(bytes(left.state.stat().st_size)), 0, "state"),
    "two parts": (a_second_part, SURE, ""),
}
"""What may be wrong after a power cut; the bytes of the part that are kept; where it is counted as damage."""
PATHS = {name: content_path("full.zip", revision=f"2608{n:02}001") for n, name in enumerate(DAMAGES)}


def test_after_a_power_cut_only_the_rest_is_fetched_whatever_it_left(serve):
    """All damages at once, each to a fill of its own: kill -9 of everything at 60 %, start, ask again."""
    gate = Gate()
    bodies = {name: zip_of(name, LENGTH) for name in DAMAGES}
    gup, upstream = serve(
        {
            PATHS[name]: (Answer(body, etag='"a"', gates=((AT, gate),)), Answer(body, etag='"a"'))
            for name, body in bodies.items()
        },
        fill={"max": len(DAMAGES)},
        cache={"keep_revisions": 0},
    )
    begun = {name: gup.begin(path, AT)[1].etag for name, path in PATHS.items()}
    gup.close_clients()
    until(lambda: list(gup.parts().values()) == [AT] * len(PATHS), "all parts are there")
    gup.kill()
    gate.open()
    for name, (damage, _, _) in DAMAGES.items():
        damage(left_of(gup, PATHS[name]))
    gup.start()
    for name, (_, kept, _) in DAMAGES.items():
        assert_resumed(gup, upstream, name, bodies[name], kept, begun[name])
    assert_counted(gup)
    until(lambda: not gup.parts(), "no part stays")
    until(lambda: not list((gup.cache_dir / "partial").glob("*.s*")), "no state or sums stay")


def left_of(gup: Gup, path: str) -> Left:
    id_ = Routes().route(path).key(Variant()).id
    partial = gup.cache_dir / "partial"
    (part,) = partial.glob(f"{id_}.*.part")
    return Left(part, part.with_suffix(".sums"), partial / f"{id_}.state")


def assert_resumed(
    gup: Gup, upstream: ScriptedUpstream, name: str, body: bytes, kept: int, etag: str
) -> None:
    response = gup.serves(PATHS[name], body)
    again = upstream.requests(PATHS[name])[1:]
    assert 1 <= len(again) <= 2, name
    if kept:
        assert response.etag == etag, name
        assert {seen.header("range") for seen in again} == {f"bytes={kept - OVERLAP_BYTES}-"}, name


def assert_counted(gup: Gup) -> None:
    """Damage, by where it was found; and all bytes, those compared in vain among them."""
    once = sum(LENGTH - kept + OVERLAP_BYTES for _, kept, _ in DAMAGES.values())
    where = [where for _, _, where in DAMAGES.values()]
    compared = where.count("part") * (CHUNK_BYTES + OVERLAP_BYTES + READ_AHEAD_BYTES)
    received = gup.metric("gup_upstream_received_bytes_total") - AT * len(DAMAGES)
    assert received <= once + compared
    for place in ("part", "state"):
        assert gup.metric("gup_integrity_failures_total", where=place) == where.count(place), place
