"""The command line: what starts things, and what people are told of their settings."""

import re

import pytest
from harness.commands import run

from gup.cli.serve import host_port, serve_flags
from gup.config import Settings, load
from gup.demo.manager import Faults
from gup.demo.run import Plan
from gup.errors import GupError, SettingsError

# --- addresses


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:2967", ("127.0.0.1", 2967)),
        ("[::1]:2967", ("::1", 2967)),
        (":2967", ("", 2967)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_host_and_port(text, found):
    assert host_port("--listen", text) == found


@pytest.mark.parametrize(
    "text", ["", "2967", "127.0.0.1", "::1:2967", "a:b", "a:70000", "a:-1", "[]:5", "[::1]", "a:\u0661"]
)
def test_other_addresses_are_named(text):
    with pytest.raises(SettingsError, match=re.escape(f"--admin: {text!r} is not right: must be HOST:PORT")):
        host_port("--admin", text)


def test_flags_become_settings_nested_like_the_file(tmp_path):
    assert serve_flags(upstream=[], listen=None, admin=None, cache_dir=None, workers=None) == ({}, [])
    flags, problems = serve_flags(
        upstream=["http://a", "http://b"], listen=":1", admin="[::1]:0", cache_dir=tmp_path, workers=0
    )
    assert problems == []
    assert flags == {
        "upstream": [{"url": "http://a"}, {"url": "http://b"}],
        "listen": {"port": 1, "admin_address": "::1", "admin_port": 0},
        "cache": {"directory": tmp_path},
        "workers": {"count": 0},
    }


# --- serve


def test_serve_hands_the_settings_to_the_supervisor(called, tmp_path):
    calls = called("gup.process.supervisor.serve", 7)
    file = tmp_path / "gup.toml"
    file.write_text('[[upstream]]\nurl = "http://file"\n[listen]\nbacklog = 9\n')
    result = run(
        *("serve", "--config", file, "--upstream", "http://a:1", "--upstream", "http://b:2"),
        *("--listen", "127.0.0.1:0", "--admin", "[::1]:5", "--cache-dir", tmp_path, "--workers", 3),
    )
    assert result.exit_code == 7, result.output
    ((settings,), named) = calls[0]
    assert [upstream.url for upstream in settings.upstream] == ["http://a:1", "http://b:2"]
    assert (settings.listen.address, settings.listen.port, settings.listen.backlog) == ("127.0.0.1", 0, 9)
    assert (settings.listen.admin_address, settings.listen.admin_port) == ("::1", 5)
    assert (settings.cache.directory, settings.workers.count) == (tmp_path, 3)
    assert named["reload"]() == settings


def test_reload_reads_the_file_again_under_the_same_flags(called, tmp_path):
    calls = called("gup.process.supervisor.serve")
    file = tmp_path / "gup.toml"
    file.write_text('[wan]\nrate = "1MB/s"\n')
    assert run("serve", "--config", file, "--upstream", "http://a").exit_code == 0
    reload = calls[0][1]["reload"]
    file.write_text('[wan]\nrate = "2MB/s"\n')
    assert reload().wan.rate == 2_000_000
    assert reload().upstream[0].url == "http://a"
    file.write_text("[wan]\nspeed = 5\n")
    with pytest.raises(SettingsError, match=r"wan\.speed"):
        reload()


def test_serve_finds_its_file_by_the_environment(called, tmp_path, monkeypatch):
    calls = called("gup.process.supervisor.serve")
    file = tmp_path / "gup.toml"
    file.write_text('[[upstream]]\nurl = "http://file"\n')
    monkeypatch.setenv("GUP_CONFIG", str(file))
    monkeypatch.setenv("GUP_WAN__RATE", "0")
    assert run("serve").exit_code == 0
    assert calls[0][0][0].upstream[0].url == "http://file"
    assert calls[0][0][0].wan.rate == 0


def test_each_mistake_of_flags_file_and_files_named_stands_on_its_line_and_nothing_starts(called, tmp_path):
    calls = called("gup.process.supervisor.serve")
    file = tmp_path / "gup.toml"
    file.write_text('[cache]\nmax_sise = 1\n[log]\nlevel = "loud"\n[catalog]\nfile = "/none"\n')
    result = run(
        *("serve", "--config", file, "--workers", "-4", "--upstream", "manager:8014", "--listen", "x"),
        *("--admin", "y:99999"),
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(":")[:2] for line in lines] == [
        ["gup", " --listen"],
        ["gup", " --admin"],
        ["gup", " cache.max_sise"],
        ["gup", " upstream#1.url"],
        ["gup", " log.level"],
        ["gup", " workers.count"],
        ["gup", " catalog.file"],
    ]
    assert "--listen: 'x'" in lines[0]
    assert "--admin: 'y:99999'" in lines[1]
    assert "'manager:8014'" in lines[3]
    assert "(from the command line)" in lines[3]
    assert calls == []


def test_serve_without_an_upstream_says_what_to_add(called):
    calls = called("gup.process.supervisor.serve")
    result = run("serve")
    assert result.exit_code == 2
    assert "--upstream http://manager:8014" in result.stderr
    assert calls == []


def test_what_goes_wrong_in_serving_is_a_sentence(called):
    called("gup.process.supervisor.serve", GupError("the disk is gone"))
    result = run("serve", "--upstream", "http://a")
    assert (result.exit_code, result.stderr) == (1, "gup: the disk is gone\n")


# --- demo, simulate


def test_demo_passes_its_flags_on(called):
    calls = called("gup.demo.run.demo", 2)
    assert run("demo").exit_code == 2
    result = run(
        *("demo", "--clients", 5, "--seconds", 2.5, "--workers", 1, "--seed", 9, "--wan-rate", "1MB/s"),
        *("--keep", "--json"),
    )
    assert result.exit_code == 2, result.output
    assert calls == [
        ((Plan(200, 30.0, 10_000_000, 2, keep=False, seed=1),), {"json_output": False}),
        ((Plan(5, 2.5, 1_000_000, 1, keep=True, seed=9),), {"json_output": True}),
    ]


def test_simulate_manager_passes_its_flags_on(called):
    calls = called("gup.demo.manager.simulate_manager")
    assert run("simulate", "manager").exit_code == 0
    result = run(
        *("simulate", "manager", "--listen", "127.0.0.1:0", "--seed", 3, "--wan-rate", "0"),
        *("--publish-interval", "250ms", "--products", 2, "--full-size", "64KiB", "--delta-size", "3kB"),
        *("--errors", "0.1", "--cuts", "0.2", "--wrong", "1", "--delay", "50ms"),
    )
    assert result.exit_code == 0, result.output
    names = ("seed", "wan_rate_bytes_per_second", "publish_interval_seconds", "products", "full_bytes")
    names += ("delta_bytes", "faults")
    assert [(address, tuple(named[name] for name in names)) for address, named in calls] == [
        (("127.0.0.1", 8014), (1, 10_000_000, 10.0, 4, 4_000_000, 200_000, Faults())),
        (("127.0.0.1", 0), (3, 0, 0.25, 2, 65536, 3000, Faults(0.1, 0.2, 1.0, 0.05))),
    ]


def test_simulate_clients_passes_its_flags_on(called):
    calls = called("gup.demo.clients.simulate_clients", 1)
    result = run(
        *("simulate", "clients", "--url", "http://g", "--manager", "http://m"),
        *("--clients", 7, "--seconds", 3, "--json"),
    )
    assert result.exit_code == 1, result.output
    named = {"count": 7, "seconds": 3.0, "seed": 1, "json_output": True}
    assert calls == [(("http://g", "http://m"), named)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--wan-rate", "8"], ["--wan-rate", "'8'", "8MB/s"]),
        (["--publish-interval", "soon"], ["--publish-interval", "'soon'", "10s"]),
        (["--full-size", "big"], ["--full-size", "'big'", "20GB"]),
        (["--listen", "8014"], ["--listen", "'8014'", "HOST:PORT"]),
        (["--products", "0"], ["--products", "1"]),
        (["--errors", "5"], ["--errors", "less than or equal to 1"]),
        (["--delay", "long"], ["--delay", "'long'", '"10s"']),
    ],
)
def test_bad_quantities_are_named(called, flags, words):
    calls = called("gup.demo.manager.simulate_manager")
    result = run("simulate", "manager", *flags)
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr
    assert calls == []


@pytest.mark.parametrize(
    "flags", [["--url", "127.0.0.1:2967"], ["--url", "http://g", "--manager", "http:/m"]]
)
def test_addresses_of_simulated_clients_are_urls(called, flags):
    calls = called("gup.demo.clients.simulate_clients", 1)
    result = run("simulate", "clients", *flags)
    assert result.exit_code == 2
    for word in (flags[-2], repr(flags[-1]), "http://127.0.0.1:2967"):
        assert word in result.stderr
    assert calls == []


# --- config


def test_config_check_says_what_the_file_means_or_every_mistake(tmp_path):
    file = tmp_path / "gup.toml"
    file.write_text(
        '[[upstream]]\nurl = "http://m:8014"\n[cache]\nmax_size = "5GB"\ndirectory = "/srv/gup"\n'
    )
    result = run("config", "check", file)
    assert (result.exit_code, result.stdout) == (
        0,
        f"{file}: ok: listens on 0.0.0.0 port 2967, keeps up to 5GB in /srv/gup, fetches from m:8014\n",
    )
    file.write_text("")
    assert "has no upstream: serve it with --upstream URL" in run("config", "check", file).stdout
    file.write_text("[listen]\nport = 99999\nprt = 1\n")
    result = run("config", "check", file)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 2)
    assert run("config", "check", tmp_path / "none.toml").exit_code == 2


def test_config_show_prints_what_is_in_force(tmp_path, monkeypatch):
    monkeypatch.setenv("GUP_CACHE__MAX_SIZE", "7GB")
    file = tmp_path / "gup.toml"
    file.write_text('[[upstream]]\nurl = "http://m"\nheaders = {Authorization = "s3cret"}\n')
    result = run("config", "show", file)
    assert result.exit_code == 0
    assert 'max_size = "7GB"' in result.stdout
    assert "s3cret" not in result.stdout
    monkeypatch.delenv("GUP_CACHE__MAX_SIZE")
    shown = tmp_path / "shown.toml"
    shown.write_text(run("config", "show").stdout)
    assert load(shown, environment={}) == Settings()
