"""Fills outlive the death of all processes: only the rest is fetched, whatever a power cut left of a part."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.caches import route
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.trees import content_path, zip_of
from harness.waiting import until

from gup.content.key import Variant

CHUNK_BYTES = 1 << 20
OVERLAP_BYTES = 64 * 1024
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


@dataclass(frozen=True)
class Damage:
    """One thing that may be wrong after a power cut, and what may have to be fetched again for it."""

    name: str
    do: Callable[[Left], None] = lambda left: None  # noqa: ARG005
    kept: int = SURE
    """Bytes of the part that must not be fetched again (but for the overlap)."""
    where: str | None = None
    """Where it is counted as damage."""

    @property
    def path(self) -> str:
        """A fill of its own: its revision is the name's sum."""
        return content_path(
            "full.zip", revision=str(200_000_000 + zlib.crc32(self.name.encode()) % 90_000_000)
        )


def garbage_at_the_end(left: Left) -> None:
    with left.part.open("ab") as file:
        file.write(random.Random(1).randbytes(300_000))


def zeros_at_the_end(left: Left) -> None:
    _overwrite(left.part, AT - 200_000, bytes(200_000))


def zeros_in_the_middle(left: Left) -> None:
    _overwrite(left.part, CHUNK_BYTES + 4096, bytes(4096))


def truncated(left: Left) -> None:
    with left.part.open("r+b") as file:
        file.truncate(AT - 1_500_000)


def longer_than_the_body(left: Left) -> None:
    with left.part.open("r+b") as file:
        file.truncate(LENGTH + 1000)


def torn_sums(left: Left) -> None:
    left.sums.write_bytes(left.sums.read_bytes()[:11])


def torn_state(left: Left) -> None:
    left.state.write_bytes(left.state.read_bytes()[:200])


def state_of_zeros(left: Left) -> None:
    left.state.write_bytes(bytes(left.state.stat().st_size))


def a_second_part(left: Left) -> None:
    """Of an older generation, as a takeover leaves it that died before it dropped the damaged one."""
    id_, generation, _ = left.part.name.split(".")
    left.part.with_name(f"{id_}.{int(generation) - 5}.part").write_bytes(bytes(1_000_000))


def _overwrite(path: Path, at: int, piece: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(piece)


DAMAGES = [
    Damage("nothing"),
    Damage("random bytes at the end", garbage_at_the_end, where="part"),
    Damage("zeros at the end", zeros_at_the_end, where="part"),
    Damage("zeros in the middle", zeros_in_the_middle, CHUNK_BYTES, where="part"),
    Damage("truncated", truncated, CHUNK_BYTES),
    Damage("longer than the body is", longer_than_the_body, where="part"),
    Damage("no sums", lambda left: left.sums.unlink(), 0),
    Damage("torn sums", torn_sums, CHUNK_BYTES),
    Damage("no state file", lambda left: left.state.unlink(), 0),
    Damage("torn state", torn_state, 0, where="state"),
    Damage("state of zeros", state_of_zeros, 0, where="state"),
    Damage("two parts", a_second_part),
]


def test_after_a_power_cut_only_the_rest_is_fetched_whatever_it_left(tmp_path):
    """All damages at once, each to a fill of its own: kill -9 of everything at 60 %, start, ask again."""
    assert len({damage.path for damage in DAMAGES}) == len(DAMAGES)
    gate = Gate()
    with ScriptedUpstream() as upstream:
        for damage in DAMAGES:
            body = zip_of(damage.name, LENGTH)
            upstream.answer(
                damage.path, Answer(body, etag='"a"', gates=((AT, gate),)), Answer(body, etag='"a"')
            )
        settings = {
            "upstream": [{"url": upstream.url}],
            "fill": {"max": len(DAMAGES)},
            "cache": {"keep_revisions": 0},
        }
        with Gup(tmp_path / "cache", settings=settings) as gup:
            tags = _fetch_to(gup, [damage.path for damage in DAMAGES])
            gup.kill()
            gate.open()
            for damage in DAMAGES:
                damage.do(_left(gup, damage.path))
            gup.start()
            for damage in DAMAGES:
                _assert_resumed(gup, upstream, damage, tags[damage.path])
            _assert_counted(gup)
            until(lambda: not gup.parts(), "no part stays")
            until(lambda: not list((gup.cache_dir / "partial").glob("*.s*")), "no state or sums stay")


def _fetch_to(gup: Gup, paths: list[str]) -> dict[str, str]:
    """Ask for all; their tags, when each is filled as far as the gates let it."""
    connections = {path: gup.connect() for path in paths}
    tags = {}
    for path, connection in connections.items():
        connection.ask(path)
    for path, connection in connections.items():
        tags[path] = connection.head().etag
        assert len(connection.read(AT)) == AT
        connection.close()
    until(lambda: list(gup.parts().values()) == [AT] * len(paths), "all parts are there")
    return tags


def _left(gup: Gup, path: str) -> Left:
    id_ = route(path).key(Variant()).id
    partial = gup.cache_dir / "partial"
    (part,) = partial.glob(f"{id_}.*.part")
    return Left(part, part.with_suffix(".sums"), partial / f"{id_}.state")


def _assert_resumed(gup: Gup, upstream: ScriptedUpstream, damage: Damage, etag: str) -> None:
    body = zip_of(damage.name, LENGTH)
    response = gup.get(damage.path)
    assert (response.status, response.complete) == (200, True), damage.name
    assert response.body == body, damage.name
    if damage.kept:
        assert response.etag == etag, damage.name
    gup.wait_stored("full.zip")
    again = upstream.requests(damage.path)[1:]
    assert 1 <= len(again) <= 2, damage.name
    if damage.kept:
        asked = {seen.header("range") for seen in again}
        assert asked == {f"bytes={damage.kept - OVERLAP_BYTES}-"}, damage.name


def _assert_counted(gup: Gup) -> None:
    """Damage, by where it was found; and all bytes, those compared in vain among them."""
    once = sum(LENGTH - damage.kept + OVERLAP_BYTES for damage in DAMAGES)
    compared = sum(damage.where == "part" for damage in DAMAGES) * (CHUNK_BYTES + OVERLAP_BYTES)
    received = gup.metric("gup_upstream_received_bytes_total") - AT * len(DAMAGES)
    assert received <= once + compared
    counted = {where: gup.metric("gup_integrity_failures_total", where=where) for where in ("part", "state")}
    assert counted == {where: sum(damage.where == where for damage in DAMAGES) for where in ("part", "state")}
