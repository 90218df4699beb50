"""A site is seeded from another one's archive: by running services and by stopped ones."""

import json
import subprocess
from pathlib import Path

import pytest
from harness.commands import command
from harness.content import DELTA, content_path, noise, zip_of
from harness.processes import needs, until
from harness.service import Gup
from harness.upstreams import Answer, ScriptedUpstream

FULL = content_path("full.zip")
BODIES = {FULL: zip_of("full", 3_000_000), DELTA: noise("delta", 70_000)}
NOBODY = "http://127.0.0.1:9"


def settings_of(gup: Gup, file: Path) -> Path:
    file.write_text(f'[listen]\nadmin_port = {gup.admin[1]}\n[cache]\ndirectory = "{gup.cache_dir}"\n')
    return file


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `site.tar`, which a service with both bodies wrote, and its cache directory `first`."""
    tmp_path = tmp_path_factory.mktemp("site")
    archive = tmp_path / "site.tar"
    with ScriptedUpstream() as upstream:
        for path, body in BODIES.items():
            upstream.answer(path, Answer(body, etag='"x"'))
        with Gup(tmp_path / "first", [upstream.url], workers=1) as gup:
            for path, body in BODIES.items():
                assert gup.get(path).body == body
            until(lambda: gup.metric("gup_cache_entries") >= 2, "the entries are known")
            settings = settings_of(gup, tmp_path / "first.toml")
            done = command("cache", "export", archive, "--config", settings, "--json")
            assert (done.returncode, json.loads(done.stdout)["left_out"]) == (0, []), done
            again = command("cache", "export", archive, "--config", settings)
            assert (again.returncode, "overwrites nothing" in again.stderr) == (1, True), again
            part = command("cache", "export", tmp_path / "part.tar", "--config", settings, "--kind", "delta")
            assert "1 entries, 70.0 kB" in part.stdout, part
            gup.stop()
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["part.tar", "site.tar"]
    return tmp_path


def test_a_running_site_is_seeded_without_an_upstream(site, tmp_path):
    archive = site / "site.tar"
    damaged = tmp_path / "damaged.tar"
    text = bytearray(archive.read_bytes())
    text[text.index(BODIES[DELTA][:1000]) + 500] ^= 1
    damaged.write_bytes(text)
    (tmp_path / "cut.tar").write_bytes(archive.read_bytes()[:2_000_000])
    with Gup(tmp_path / "second", [NOBODY], workers=1) as gup:
        until(lambda: gup.status()["cache"]["complete"], "the index is complete")
        settings = settings_of(gup, tmp_path / "second.toml")
        token = {"GUP_TOKEN_FILE": str(gup.cache_dir / "run" / "admin-token")}
        url = f"http://127.0.0.1:{gup.admin[1]}"

        refused = command("cache", "import", archive, "--admin", url)
        assert (refused.returncode, "needs Authorization" in refused.stderr) == (1, True), refused
        odd = command("cache", "import", tmp_path / "second.toml", "--admin", url, **token)
        assert (odd.returncode, "it is no archive made by gup" in odd.stderr) == (1, True), odd
        here = command("cache", "import", archive, "--cache-dir", gup.cache_dir)
        assert (here.returncode, str(gup.process.pid) in here.stderr) == (1, True), here

        cut = command("cache", "import", tmp_path / "cut.tar", "--admin", url, "--json", **token)
        assert (cut.returncode, json.loads(cut.stdout)["complete"]) == (1, False), cut
        half = command("cache", "import", damaged, "--config", settings)
        assert (half.returncode, "damaged: its bytes" in half.stdout) == (1, True), half
        assert gup.metric("gup_cache_entries") >= 1
        assert gup.get(FULL).body == BODIES[FULL]

        whole = command("cache", "import", archive, "--config", settings, "--json")
        assert whole.returncode == 0, whole
        told = json.loads(whole.stdout)
        assert (told["imported"], told["refused"]) == (1, [])
        assert told["present"] >= 1
        answer = gup.get(DELTA)
        assert (answer.body, answer.header("cache-status")) == (BODIES[DELTA], "gup; hit")
        assert command("cache", "verify", "--config", settings).returncode == 0
        assert gup.metric("gup_upstream_received_bytes_total") == 0
        assert gup.parts() == {}


def test_a_stopped_site_is_exported_and_seeded(site, tmp_path):
    archive = tmp_path / "stopped.tar"
    done = command("cache", "export", archive, "--cache-dir", site / "first", "--json")
    assert done.returncode == 0, done
    entries = json.loads(done.stdout)["entries"]
    target = tmp_path / "third"
    foreign = command("cache", "import", archive, "--cache-dir", site)
    assert (foreign.returncode, "is no cache directory" in foreign.stderr) == (1, True), foreign
    told = json.loads(command("cache", "import", archive, "--cache-dir", target, "--json").stdout)
    assert (told["imported"], told["refused"], told["complete"]) == (entries, [], True)
    small = command("cache", "import", archive, "--cache-dir", site / "first", GUP_CACHE__MAX_SIZE="1MB")
    assert f"{entries} were here already" in small.stdout
    (tmp_path / "fourth" / "lost+found").mkdir(parents=True)
    small = command("cache", "import", archive, "--cache-dir", tmp_path / "fourth", GUP_CACHE__MAX_SIZE="1MB")
    assert (small.returncode, "cache.max_size (1MB) would be exceeded" in small.stdout) == (1, True), small
    with Gup(target, [NOBODY], workers=1) as gup:
        for path, body in BODIES.items():
            gup.serves(path, body)


def test_a_signed_archive_is_taken_where_a_signature_is_required_and_no_other(site, tmp_path):
    key, public, target = tmp_path / "key.pem", tmp_path / "key.pub", tmp_path / "target"
    for words in (f"genpkey -algorithm ed25519 -out {key}", f"pkey -in {key} -pubout -out {public}"):
        subprocess.run([needs("openssl"), *words.split()], check=True, capture_output=True)
    signed = tmp_path / "signed.tar"
    where = ("--cache-dir", site / "first")
    assert "not signed" in command("cache", "export", tmp_path / "plain.tar", *where).stdout
    bad = command("cache", "export", signed, *where, "--sign-key", public)
    assert (bad.returncode, "a private Ed25519 key" in bad.stderr, signed.exists()) == (1, True, False), bad
    done = command("cache", "export", signed, *where, "--sign-key", key)
    assert (done.returncode, "signed by the key" in done.stdout) == (0, True), done
    text = bytearray(signed.read_bytes())
    text[text.index(BODIES[DELTA][:1000]) + 500] ^= 1
    (tmp_path / "changed.tar").write_bytes(text)
    for name, why in (("plain", "it is not signed"), ("changed", "it is not what was signed")):
        file = tmp_path / f"{name}.tar"
        refused = command("cache", "import", file, "--cache-dir", target, GUP_SIGNED_BY=str(public))
        assert (refused.returncode, why in refused.stderr, target.exists()) == (1, True, False), refused
    taken = command("cache", "import", signed, "--cache-dir", target, "--signed-by", public)
    assert (taken.returncode, "signed by the key" in taken.stdout) == (0, True), taken
    again = command("cache", "import", tmp_path / "plain.tar", "--cache-dir", target)
    assert (again.returncode, "the archive is not signed" in again.stdout) == (0, True), again
