"""The control plane's door as an administrator finds it: tokens, TLS, commands, on loopback and beyond."""

import json
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from harness.commands import command, started
from harness.scripted import ScriptedUpstream
from harness.service import Gup
from harness.waiting import until


def certificate(folder: Path, name: str) -> None:
    """A certificate of its own for 127.0.0.1 and its key, in the files that the settings name."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip


class Asking:
    """Asks over TLS, trusting the certificate that is in the file at that time."""

    def __init__(self, gup: Gup, cert: Path) -> None:
        self._gup = gup
        self._cert = cert

    def __call__(self, method: str, path: str, token: str = "", **headers: str) -> tuple[int, dict[str, str]]:
        port = self._gup.admin[1]
        shown = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(
            f"https://127.0.0.1:{port}{path}", method=method, headers=headers | shown
        )
        context = ssl.create_default_context(cafile=str(self._cert))
        try:
            with urllib.request.urlopen(request, timeout=15, context=context) as answer:
                return answer.status, dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers)


def test_beyond_loopback_everything_needs_a_token_and_tokens_and_certificate_are_renewed(tmp_path):
    names = {name: tmp_path / name for name in ("token", "read", "cert.pem", "key.pem")}
    names["token"].write_text("change-token-of-this-test\n")
    names["read"].write_text("read-token-of-this-test\n")
    for name in ("token", "read"):
        names[name].chmod(0o600)
    certificate(tmp_path, "first")
    listen = {
        "admin_token_file": str(names["token"]),
        "admin_read_token_file": str(names["read"]),
        "admin_cert_file": str(names["cert.pem"]),
        "admin_key_file": str(names["key.pem"]),
    }
    settings = {"listen": listen}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], workers=1, settings=settings, admin="0.0.0.0:0") as gup,
    ):
        ask = Asking(gup, names["cert.pem"])
        change, read = "change-token-of-this-test", "read-token-of-this-test"
        status, headers = ask("GET", "/api/v1/status")
        assert (status, headers["WWW-Authenticate"]) == (401, 'Bearer realm="gup"')
        assert [ask("GET", path)[0] for path in ("/healthz", "/metrics", "/")] == [200, 401, 401]
        assert ask("GET", "/metrics", read, Host="gup.site.example")[0] == 200
        assert ask("GET", "/metrics", read + "x")[0] == 401
        assert [ask("POST", "/api/v1/evict", token)[0] for token in ("", read, change)] == [401, 403, 200]
        assert ask("POST", "/api/v1/evict", change, Origin="https://evil.example")[0] == 403
        assert ask("POST", "/api/v1/evict", gup.token)[0] == 200
        assert [path for path in names if f"{names[path]} can be read by everybody" in gup.log] == []

        # commands: by URL with whom to trust, and by settings
        url = f"https://127.0.0.1:{gup.admin[1]}"
        told = command("status", "--json", "--admin", url, GUP_TOKEN_FILE=str(names["read"]),
                       GUP_CA_FILE=str(names["cert.pem"]))  # fmt: skip
        assert (told.returncode, json.loads(told.stdout)["wan_rate_bytes_per_second"]) == (0, None), (
            told.stderr
        )
        distrusted = command("status", "--admin", url, "--token-file", names["read"])
        assert (distrusted.returncode, "--ca-file" in distrusted.stderr) == (1, True), distrusted
        mine = tmp_path / "mine.toml"
        mine.write_text(
            f'[listen]\nadmin_address = "0.0.0.0"\nadmin_port = {gup.admin[1]}\n'
            + "".join(f'{name} = "{value}"\n' for name, value in listen.items())
        )
        certificate(tmp_path, "second")
        pinned = command("reload", "--config", mine)
        assert (pinned.returncode, "does not show the certificate" in pinned.stderr) == (1, True), pinned

        # read again on reload
        names["token"].write_text("another-token-of-this-test\n")
        names["token"].chmod(0o644)
        gup.signal(signal.SIGHUP)
        until(lambda: ask_again(ask, "another-token-of-this-test") == 200, "the new token holds")
        assert ask("POST", "/api/v1/evict", change)[0] == 401
        gup.wait_log(f"{names['token']} can be read by everybody")
        assert command("reload", "--config", mine).returncode == 0

        # what can't be used leaves the old ones in force
        names["token"].write_text("\n")
        own = tmp_path / "own-token"
        own.write_text("another-token-of-this-test\n")
        refused = command("reload", "--config", mine, "--token-file", own)
        assert (refused.returncode, "listen.admin_token_file: " in refused.stderr) == (1, True), refused
        gup.wait_log("settings not reloaded: listen.admin_token_file: ")
        assert ask("POST", "/api/v1/evict", "another-token-of-this-test")[0] == 200
        gup.wait_log("unknown token from 127.0.0.1")
        assert change not in gup.log


def ask_again(ask: Asking, token: str) -> int:
    """0 while the old certificate is shown."""
    try:
        return ask("POST", "/api/v1/evict", token)[0]
    except urllib.error.URLError:
        return 0


def test_on_loopback_looking_is_open_and_changing_needs_the_token_left_in_run(tmp_path):
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url], workers=1) as gup:
        settings = tmp_path / "gup.toml"
        settings.write_text(
            f'[listen]\nadmin_port = {gup.admin[1]}\n[cache]\ndirectory = "{gup.cache_dir}"\n'
        )
        assert (gup.cache_dir / "run" / "admin-token").stat().st_mode & 0o777 == 0o600
        assert gup.status()["version"]
        url = f"http://127.0.0.1:{gup.admin[1]}"
        refused = command("reload", "--admin", url)
        assert refused.returncode == 1
        assert str(gup.cache_dir / "run" / "admin-token") in refused.stderr
        assert "settings reloaded" not in gup.log
        assert command("reload", "--config", settings).returncode == 0
        until(lambda: "settings reloaded" in gup.log, "the settings were read again")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("", "listen.admin_address: 0.0.0.0 can be reached by others, so every request needs a token"),
        ('admin_token_file = "{folder}/empty"\n', "listen.admin_token_file: '{folder}/empty' is empty"),
        ('admin_token_file = "{folder}/none"\n', "listen.admin_token_file: '{folder}/none' can't be read"),
    ],
)
def test_without_a_token_nothing_starts_beyond_loopback(tmp_path, files, words):
    (tmp_path / "empty").write_text("")
    settings = tmp_path / "gup.toml"
    settings.write_text("[listen]\n" + files.format(folder=tmp_path))
    flags = ("--upstream", "http://127.0.0.1:9", "--cache-dir", tmp_path / "cache", "--listen", "127.0.0.1:0")
    refused = started("serve", "--config", settings, *flags, "--admin", "0.0.0.0:0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert words.format(folder=tmp_path) in refused.stderr
    assert not (tmp_path / "cache").exists()
    settings.write_text(settings.read_text() + 'admin_address = "0.0.0.0"\n')
    checked = command("config", "check", settings)
    assert (checked.returncode, words.format(folder=tmp_path) in checked.stderr) == (2, True)
