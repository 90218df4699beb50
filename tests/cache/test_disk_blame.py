"""Only what the disk refused is told as the disk's; whatever else fails in a fill is not."""

import errno
import os
import ssl

import pytest
from harness.caches import path_of, working
from harness.upstreams import Answer

from gup.cache.disk import DiskError, disk_errors, on_disk
from gup.cache.part_file import PartWriter
from gup.cache.store import Store
from gup.errors import GupError, Problem, is_exhausted

FILE = path_of("xdelta260731001.dax")
ELSEWHERE = [
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/etc/gup/ca.pem"),
    ssl.SSLError(136, "[X509] no certificate or crl found"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.ENOLCK, "No locks available"),
]


def disk_is_blamed(worker) -> bool:
    return any(event["type"] in ("unstorable", "need") for event in worker.told)


@pytest.mark.parametrize("error", ELSEWHERE, ids=lambda error: f"{type(error).__name__} {error.errno}")
@pytest.mark.parametrize("where", ["asked", "read"])
async def test_an_error_that_did_not_come_from_the_disk_is_not_told_as_the_disks(
    tmp_path, upstream, monkeypatch, caplog, error, where
):
    body = b"x" * 10_000
    upstream.answer(FILE, Answer(body, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one:

        async def fails(*_arguments, **_named):
            raise error

        target = "gup.upstream.pool.Pool.ask" if where == "asked" else "gup.upstream.pool.Answer.read"
        with monkeypatch.context() as patch:
            patch.setattr(target, fails)
            with pytest.raises(Problem) as caught:
                await one.get(FILE)
        assert caught.value.slug == ("overloaded" if is_exhausted(error) else "internal-error")
        assert not disk_is_blamed(one), one.told
        assert "cache directory can't be written" not in caplog.text + caught.value.detail
        assert one.counted("gup_fills_total", outcome="unstorable") == 0
        assert await one.get(FILE) == body, "and it is fetched and stored as soon as that is over"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(("owner", "work"), [(PartWriter, "_write_now"), (Store, "commit")])
async def test_what_the_disk_refuses_is_told_as_the_disks(
    tmp_path, upstream, monkeypatch, until, number, owner, work
):
    body = b"x" * 10_000
    upstream.answer(FILE, Answer(body, etag='"a"'))

    original = getattr(owner, work)

    def refuses(self, *arguments, **named):
        if getattr(self, "_in_memory", False):
            return original(self, *arguments, **named)
        raise OSError(number, os.strerror(number))

    async with working(tmp_path, [upstream.url]) as one:
        monkeypatch.setattr("gup.cache.disk._PATIENCE_SECONDS", 0.05)
        monkeypatch.setattr(owner, work, refuses)
        assert await one.get(FILE) == body
        await until(lambda: not one.cache.fills, "the fill ends")
        told = [event for event in one.told if event["type"] == "unstorable"]
        assert [(event["disk"], event["detail"]) for event in told] == [
            (True, f"the cache directory can't be written to: {os.strerror(number)}")
        ]


async def test_a_body_beyond_the_limit_is_no_refusal_of_the_disk(tmp_path, upstream, until):
    upstream.answer(FILE, Answer(b"x" * 2_000_000, etag='"a"'))
    async with working(tmp_path, [upstream.url], cache={"max_size": "1MB"}) as one:
        assert await one.get(FILE) == b"x" * 2_000_000
        await until(lambda: not one.cache.fills, "the fill ends")
        told = [event for event in one.told if event["type"] == "unstorable"]
        assert [event["disk"] for event in told] == [False]
        assert "cache.max_size" in told[0]["detail"]


async def test_an_error_keeps_its_number_and_what_is_no_error_of_the_system_stays(executor):
    def refuses():
        raise OSError(errno.ENOSPC, "No space left on device", "/var/lib/gup/x")

    with pytest.raises(DiskError) as caught:
        await on_disk(executor, refuses)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/var/lib/gup/x")
    assert isinstance(caught.value, GupError)
    with pytest.raises(ValueError, match="not mine"), disk_errors():
        raise ValueError("not mine")
