"""A site is seeded from another one's archive: by running services and by stopped ones."""

import json
import subprocess
from pathlib import Path

import pytest
from harness.commands import command
from harness.content import DELTA, content_path, noise, zip_of
from harness.needs import program
from harness.processes import until
from harness.service import Gup
from harness.upstreams import ScriptedUpstream

FULL = content_path("full.zip")
BODIES = {FULL: zip_of("full", 3_000_000), DELTA: noise("delta", 70_000)}
NOBODY = "http://127.0.0.1:9"


def settings_of(gup: Gup, file: Path) -> Path:
    file.write_text(f'[listen]\nadmin_port = {gup.admin[1]}\n[cache]\ndirectory = "{gup.cache_dir}"\n')
    return file


def cache(what: str, *arguments: object, code: int = 0, says: str = "", **env: str) -> str:
    """One `gup cache` command, which ends with this code and says so much; what it writes."""
    done = command("cache", what, *arguments, **env)
    assert (done.returncode, says in done.stdout + done.stderr) == (code, True), done
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `site.tar`, which a service with both bodies wrote, and its cache directory `first`."""
    folder = tmp_path_factory.mktemp("site")
    archive = folder / "site.tar"
    with ScriptedUpstream() as upstream, Gup(folder / "first", [upstream.url], workers=1) as gup:
        for path, body in BODIES.items():
            upstream.answer(path, body)
            gup.serves(path, body)
        until(lambda: gup.metric("gup_cache_entries") >= 2, "the entries are known")
        by = ("--config", settings_of(gup, folder / "first.toml"))
        assert json.loads(cache("export", archive, *by, "--json"))["left_out"] == []
        cache("export", archive, *by, code=1, says="does not overwrite files")
        cache("export", folder / "part.tar", *by, "--kind", "delta", says="1 entries, 70.0 kB")
    assert sorted(path.name for path in folder.glob("*.tar")) == ["part.tar", "site.tar"]
    return folder


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
        remote, by = ("--admin", gup.admin_url), ("--config", settings)
        cache("import", archive, *remote, code=1, says="Changes need a token")
        cache("import", settings, *remote, code=1, says="it is not an archive made by gup", **token)
        cache("import", archive, "--cache-dir", gup.cache_dir, code=1, says=str(gup.process.pid))
        cut = cache("import", tmp_path / "cut.tar", *remote, "--json", code=1, **token)
        assert json.loads(cut)["complete"] is False
        cache("import", damaged, *by, code=1, says="damaged: its bytes")
        assert gup.metric("gup_cache_entries") >= 1
        gup.serves(FULL, BODIES[FULL])
        told = json.loads(cache("import", archive, *by, "--json"))
        assert (told["imported"], told["refused"], told["present"] >= 1) == (1, [], True)
        assert gup.serves(DELTA, BODIES[DELTA]).header("cache-status") == "gup; hit"
        cache("verify", *by)
        assert gup.metric("gup_upstream_received_bytes_total") == 0
        assert gup.parts() == {}


def test_a_stopped_site_is_exported_and_seeded(site, tmp_path):
    archive = tmp_path / "stopped.tar"
    first, target, small = site / "first", tmp_path / "third", tmp_path / "fourth"
    entries = json.loads(cache("export", archive, "--cache-dir", first, "--json"))["entries"]
    french = ("--version", "14.3 RU2", "--language", "fr")
    site_of = json.loads(cache("export", tmp_path / "fr.tar", "--cache-dir", first, *french, "--json"))
    assert (site_of["entries"], site_of["not_wanted"]) == (entries, {}), "all of it is for every site"
    none = cache("export", tmp_path / "none.tar", "--cache-dir", first, *french, "--revision", "000000000")
    assert f"left out: {entries} entries: it is not of that revision" in none
    cache("import", archive, "--cache-dir", site, code=1, says="is no cache directory")
    (small / "lost+found").mkdir(parents=True)
    told = json.loads(cache("import", archive, "--cache-dir", target, "--json"))
    assert (told["imported"], told["refused"], told["complete"]) == (entries, [], True)
    limit, already = {"GUP_CACHE__MAX_SIZE": "1MB"}, f"{entries} were stored already"
    cache("import", archive, "--cache-dir", first, says=already, **limit)
    exceeded = "cache.max_size (1MB) would be exceeded"
    cache("import", archive, "--cache-dir", small, code=1, says=exceeded, **limit)
    with Gup(target, [NOBODY], workers=1) as gup:
        for path, body in BODIES.items():
            gup.serves(path, body)


@pytest.mark.needs("openssl")
def test_a_signed_archive_is_taken_where_a_signature_is_required_and_no_other(site, tmp_path):
    key, public, target = tmp_path / "key.pem", tmp_path / "key.pub", tmp_path / "target"
    for words in (f"genpkey -algorithm ed25519 -out {key}", f"pkey -in {key} -pubout -out {public}"):
        subprocess.run([program("openssl"), *words.split()], check=True, capture_output=True)
    signed = tmp_path / "signed.tar"
    first, here = ("--cache-dir", site / "first"), ("--cache-dir", target)
    plain, changed = tmp_path / "plain.tar", tmp_path / "changed.tar"
    cache("export", plain, *first, says="not signed")
    cache("export", signed, *first, "--sign-key", public, code=1, says="a private Ed25519 key")
    assert not signed.exists()
    cache("export", signed, *first, "--sign-key", key, says="signed by the key")
    text = bytearray(signed.read_bytes())
    text[text.index(BODIES[DELTA][:1000]) + 500] ^= 1
    changed.write_bytes(text)
    for file, why in ((plain, "it is not signed"), (changed, "it is not what was signed")):
        cache("import", file, *here, code=1, says=why, GUP_SIGNED_BY=str(public))
        assert not target.exists()
    cache("import", signed, *here, "--signed-by", public, says="signed by the key")
    cache("import", plain, *here, says="the archive is not signed")
