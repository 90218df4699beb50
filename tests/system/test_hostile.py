"""What SECURITY.md says of clients and of other users of the machine, where no other test shows it."""

import contextlib
import os
import stat

from harness.clients import send_raw
from harness.content import noise
from harness.processes import command_line, until
from harness.service import Gup, toml
from harness.upstreams import ScriptedUpstream

INDEX = "/content/ContentInfo.txt"
LARGE, LARGE_BODY = "/content/large.bin", noise("large", 4_000_000)
FIELDS = {
    "Host": "evil.example:80",
    "Accept": "*/*, ../../etc/passwd",
    "Accept-Encoding": "gzip, br",
    "Authorization": "Basic eDp5",
    "Connection": "Upgrade, HTTP2-Settings, X-Forwarded-Host",
    "Cookie": "a=b",
    "Expect": "100-continue",
    "Forwarded": "for=192.0.2.1;host=evil.example",
    "GUP-Client-Version": "14.3 RU9\t",
    "HTTP2-Settings": "AAMAAABk",
    "If-None-Match": '"nothing"',
    "Origin": "http://evil.example",
    "Proxy-Authorization": "Basic eDp5",
    "Range": "bytes=0-1",
    "TE": "trailers",
    "Upgrade": "h2c",
    "User-Agent": "SEP/14.3 (evil)",
    "Via": "1.0 evil.example, 1.1 north (gup), 1.1 a\tb (gup), 1.1 x?y (gup)",
    "X-Forwarded-Host": "evil.example",
    "X-HTTP-Method-Override": "DELETE",
    "X-Original-URL": "/secars/secars.dll",
}
"""What has poisoned other caches, led them elsewhere, or was smuggled through them."""


def test_of_a_clients_head_only_the_path_and_the_gups_in_via_reach_an_upstream(serve):
    body = noise("index", 5000)
    gup, upstream = serve({INDEX: body, LARGE: LARGE_BODY}, workers=1)
    head = "".join(f"{name}: {value}\r\n" for name, value in FIELDS.items())
    target = f"{INDEX}?evil=1&x=%0d%0aX-Evil:%20y"
    first = send_raw(gup.data, f"GET {target} HTTP/1.1\r\n{head}\r\n".encode())
    assert (first.status, first.body) == (206, body[:2])
    gup.serves(LARGE, LARGE_BODY)
    (evil,), (plain,) = upstream.requests(INDEX), upstream.requests(LARGE)
    (via,) = [value for name, value in plain.fields if name == "via"]
    assert evil.path == INDEX, "without its query"
    assert dict(evil.fields) == {**dict(plain.fields), "via": f"1.1 north (gup), {via}"}
    assert len(evil.fields) == len(plain.fields)
    answer = gup.serves(INDEX, body)
    assert answer.header("cache-status") == "gup; hit", "the next client gets the same"
    assert "evil" not in str(answer.fields)


def test_a_client_that_asks_and_does_not_read_is_read_no_further(serve):
    gup, _ = serve({LARGE: LARGE_BODY}, workers=1)
    gup.serves(LARGE, LARGE_BODY)
    client = gup.connect(timeout_seconds=1.0)
    asked, request = 0, b"GET %b HTTP/1.1\r\nHost: gup\r\n\r\n" % LARGE.encode() * 1000
    with contextlib.suppress(TimeoutError):
        while asked < 200 * 1000 * 1000:
            client.send(request)
            asked += len(request)
    assert asked < 20 * 1000 * 1000, "what the kernel buffers, at both ends"
    gup.serves(LARGE, LARGE_BODY)


def test_other_users_of_the_machine_find_bodies_and_nothing_else(tmp_path):
    """Also in a cache directory that an older gup has left open. Who may read a lock file can lock it."""
    before = os.umask(0o022)
    try:
        with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", start=False, workers=1) as gup:
            (gup.cache_dir / "run").mkdir(parents=True, mode=0o755)
            upstream.answer(LARGE, LARGE_BODY)
            log = tmp_path / "gup.log"
            sections = {"log": {"destination": str(log)}, "upstream": [{"name": "u0", "url": upstream.url}]}
            file = gup.folder / "gup.toml"
            file.write_text(toml(sections) + 'headers = {Authorization = "Bearer s3same"}\n')
            gup.command += ["--config", str(file)]
            gup.start()
            gup.serves(LARGE, LARGE_BODY)
            gup.wait_stored(LARGE)
            until((gup.cache_dir / "reports" / "stats.db").exists, "statistics are kept")
            assert "s3same" not in str([command_line(pid) for pid in gup.pids])
            files = [path for path in gup.cache_dir.rglob("*") if path.is_file()]
            assert [path for path in files if b"s3same" in path.read_bytes()] == []
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in gup.cache_dir.iterdir()}
            assert modes.pop("content") == 0o755
            assert set(modes.values()) == {0o700}, modes
            open_to_all = [gup.cache_dir, *(gup.cache_dir / "content").rglob("*")]
            assert [path for path in open_to_all if path.stat().st_mode & 0o022] == [], "others may write"
            assert stat.S_IMODE((gup.cache_dir / "run" / "streams.lock").stat().st_mode) == 0o600
            assert log.stat().st_mode & 0o007 == 0
    finally:
        os.umask(before)
