"""The control plane's door as an administrator finds it: tokens, TLS, commands, on loopback and beyond."""

import contextlib
import functools
import json
import re
import signal
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from harness.clients import fetch
from harness.commands import command, started
from harness.processes import until
from harness.service import Gup, toml
from harness.upstreams import certificate


def ask(gup: Gup, cert: Path, method: str, path: str, token: str = "", **headers: str) -> int:
    """The status, asked over TLS, trusting the certificate in the file; 0 while another one is shown."""
    shown = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"https://127.0.0.1:{gup.admin[1]}{path}"
    request = urllib.request.Request(url, method=method, headers=headers | shown)
    context = ssl.create_default_context(cafile=str(cert))
    try:
        with urllib.request.urlopen(request, timeout=15, context=context) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            told = error.headers["WWW-Authenticate"] or ""
            return error.code if error.code != 401 or told.startswith('Bearer realm="gup"') else -1
    except urllib.error.URLError:
        return 0


def test_beyond_loopback_everything_needs_a_token_and_tokens_and_certificate_are_renewed(serve, tmp_path):
    change, read, newer = (f"{name}-token-of-this-test" for name in ("change", "read", "newer"))
    tokens = {"token": change, "read": read}
    for name, text in tokens.items():
        (tmp_path / name).write_text(f"{text}\n")
        (tmp_path / name).chmod(0o600)
    certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    files = {"admin_token_file": "token", "admin_read_token_file": "read"}
    files |= {"admin_cert_file": "cert.pem", "admin_key_file": "key.pem"}
    listen = {name: str(tmp_path / file) for name, file in files.items()}
    gup, _ = serve(workers=1, admin="0.0.0.0:0", listen=listen)
    asked = functools.partial(ask, gup, tmp_path / "cert.pem")
    paths = ("/healthz", "/api/v1/status", "/metrics", "/")
    assert [asked("GET", path) for path in paths] == [200, 401, 401, 401]
    assert asked("GET", "/metrics", read, Host="gup.site.example") == 200
    assert asked("GET", "/metrics", read + "x") == 401
    assert [asked("POST", "/api/v1/evict", token) for token in ("", read, change)] == [401, 403, 200]
    assert asked("POST", "/api/v1/evict", change, Origin="https://evil.example") == 403
    assert asked("POST", "/api/v1/evict", gup.token) == 200
    assert "can be read by everybody" not in gup.log

    # commands: by URL with whom to trust, and by settings
    url, trusted = f"https://127.0.0.1:{gup.admin[1]}", {"GUP_CA_FILE": listen["admin_cert_file"]}
    told = command("status", "--json", "--admin", url, GUP_TOKEN_FILE=str(tmp_path / "read"), **trusted)
    assert (told.returncode, json.loads(told.stdout)["wan_rate_bytes_per_second"]) == (0, None), told.stderr
    refuses("--ca-file", "status", "--admin", url, "--token-file", tmp_path / "read")
    mine = tmp_path / "mine.toml"
    mine.write_text(toml({"listen": {"admin_address": "0.0.0.0", "admin_port": gup.admin[1], **listen}}))
    certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    refuses("does not show the certificate", "reload", "--config", mine)

    # read again on reload
    (tmp_path / "token").write_text(f"{newer}\n")
    (tmp_path / "token").chmod(0o644)
    gup.signal(signal.SIGHUP)
    until(lambda: asked("POST", "/api/v1/evict", newer) == 200, "the new token holds")
    assert asked("POST", "/api/v1/evict", change) == 401
    gup.wait_log(f"{tmp_path / 'token'} can be read by everybody")
    assert command("reload", "--config", mine).returncode == 0

    # what can't be used leaves the old ones in force
    (tmp_path / "token").write_text("\n")
    own = tmp_path / "own-token"
    own.write_text(f"{newer}\n")
    refuses("listen.admin_token_file: ", "reload", "--config", mine, "--token-file", own)
    gup.wait_log("settings not reloaded: listen.admin_token_file: ")
    assert asked("POST", "/api/v1/evict", newer) == 200
    gup.wait_log("unknown token from 127.0.0.1")
    assert change not in gup.log


def refuses(words: str, *arguments: object) -> None:
    done = command(*arguments)
    assert (done.returncode, words in done.stderr) == (1, True), done


def test_on_loopback_looking_is_open_and_changing_needs_the_token_left_in_run(serve, tmp_path):
    gup, _ = serve(workers=1)
    token, settings = gup.cache_dir / "run" / "admin-token", tmp_path / "mine.toml"
    mine = {"listen": {"admin_port": gup.admin[1]}, "cache": {"directory": str(gup.cache_dir)}}
    settings.write_text(toml(mine))
    assert token.stat().st_mode & 0o777 == 0o600
    assert gup.status()["version"]
    refuses(str(token), "reload", "--admin", gup.admin_url)
    assert "settings reloaded" not in gup.log
    assert command("reload", "--config", settings).returncode == 0
    gup.wait_log("settings reloaded")


def test_without_a_token_nothing_starts_beyond_loopback(tmp_path):
    (tmp_path / "empty").write_text("")
    settings = tmp_path / "gup.toml"
    token = "listen.admin_token_file: "
    for line, words in (
        ("", "listen.admin_address: 0.0.0.0 can be reached by others, so every request needs a token"),
        (f'admin_token_file = "{tmp_path}/empty"', f"{token}'{tmp_path}/empty' is empty"),
        (
            f'admin_token_file = "{tmp_path}/none"',
            f"{token}'{tmp_path}/none' can't be read",
        ),
    ):
        settings.write_text(f'[listen]\n{line}\nadmin_address = "0.0.0.0"\n')
        checked = command("config", "check", settings)
        assert (checked.returncode, words in checked.stderr) == (2, True)
    settings.write_text("")
    flags = ("--upstream", "http://127.0.0.1:9", "--cache-dir", tmp_path / "cache", "--listen", "127.0.0.1:0")
    done = started("serve", "--config", settings, *flags, "--admin", "0.0.0.0:0")
    told = "0.0.0.0 can be reached by others" in done.stderr
    assert (done.returncode, done.stdout, told, (tmp_path / "cache").exists()) == (2, "", True, False)


@pytest.mark.long
def test_half_heads_on_the_admin_port_end_and_leave_room_for_others(serve):
    gup, _ = serve(workers=1, listen={"header_timeout": "2s"})
    with contextlib.ExitStack() as stack:
        half = [stack.enter_context(socket.create_connection(gup.admin, 10)) for _ in range(700)]
        for sock in half:
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"GET /api/v1/status HTTP/1.1\r\nHost: g")
        assert gup.status()
        descriptors = max(psutil.Process(pid).num_fds() for pid in gup.children())
        assert descriptors < 600, "the oldest were closed to make room"
        body = stack.enter_context(socket.create_connection(gup.admin, 30))
        token = (gup.cache_dir / "run" / "admin-token").read_text().strip()
        fields = f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: 9"
        body.sendall(f"POST /api/v1/prefetch HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n{{".encode())
        for sock in half:
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""
        assert body.recv(100).split()[1] in (b"400", b"408")
        assert gup.status()


@pytest.mark.parametrize(
    "head",
    [
        f"GET /metrics HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {'s3cret' * 3000}\r\n\r\n",
        f"GET /{'s3cret' * 3000} HTTP/1.1\r\nHost: g\r\n\r\n",
        "GET /metrics HTTP/1.1\r\nHost: g\r\nA s3cret: x\r\n\r\n",
        "s3cret\r\n\r\n",
        "\x16\x03\x01\x00\x05\x01s3cret",
    ],
    ids=["authorization", "path", "field", "no HTTP", "TLS"],
)
def test_a_malformed_head_is_not_repeated_and_logs_a_line(serve, head):
    gup, _ = serve(workers=1)
    with socket.create_connection(gup.admin, 10) as sock:
        sock.sendall(head.encode("latin-1"))
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert re.match(rb"HTTP/1\.[01] 4", answer)
    assert b"application/problem+json" in answer
    gup.wait_log("not well-formed")
    assert len([line for line in gup.log.splitlines() if "not well-formed" in line]) == 1
    for told in (answer.decode(), gup.log):
        assert "s3cret" not in told
        assert "Traceback" not in told
    for text in (answer.decode(), str(gup_fields(gup))):
        assert not re.search(r"(?i)aiohttp|python", text)


def gup_fields(gup: Gup) -> list:
    return [fetch(gup.admin, path).fields for path in ("/api/v1/status", "/", "/nowhere")]
