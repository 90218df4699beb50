"""The command line beside a running service: what it asks, and what people are told."""

import json
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from harness.commands import run
from harness.upstreams import RawUpstream, ok

from gup.cli.admin_client import Admin, AdminError, admin_url
from gup.cli.admin_commands import budget_lines, cluster_line, hold_line, status_lines
from gup.config import Settings

# --- a running service


def totals(sent, received, saved, ratio):
    amounts = {"client_sent_bytes": sent, "upstream_received_bytes": received, "saved_bytes": saved}
    requests = {"hit": 1200, "miss": 4, "collapsed": 0, "refused": 3}
    return amounts | {"hit_ratio": ratio, "requests_total": 1207, "requests": requests}


STATUS = {
    "site": "lyon",
    "version": "0.1.0",
    "uptime_seconds": 11_105.0,
    "ready": True,
    "totals": {
        "since_start": totals(0, 0, 0, None),
        "since_install": totals(10**12, 5 * 10**9, 995 * 10**9, 0.9876),
    },
    "cache": {"entries": 12, "size_bytes": 3 * 10**9, "limit_bytes": 2 * 10**10, "free_bytes": 10**11},
    "wan_rate_bytes_per_second": 8_000_000,
    "started_at": 1000.0,
    "clients": {
        "connections": 42,
        "seen": {"1h": 3, "1d": 40, "7d": 55},
        "latest": [{"address": "10.0.0.7", "seen_at": 12_093.0}, {"address": "10.0.0.8", "seen_at": 8505.0}],
    },
    "failures": [
        {"at": 1e9, "key": f"any/any/x/{n}/full.zip", "problem": "upstream-timeout", "detail": "15 s \x1b"}
        for n in range(7)
    ],
    "upstreams": [
        {"name": "hq", "up": True, "state": "unknown", "since": 0.0, "last_error": None},
        {"name": "spare", "up": False, "state": "down", "since": 0.0, "last_error": "refused \x1b[2J"},
    ],
    "fills": [
        {"key": "any/any/x/1/full.zip", "id": "0f", "received_bytes": 25, "length_bytes": 100}
        | {"upstream": "hq", "bytes_per_second": 5.0, "remaining_seconds": 15.0},
        {"key": None, "id": "0e", "received_bytes": 1500, "length_bytes": None}
        | {"upstream": None, "bytes_per_second": None, "remaining_seconds": None},
    ],
    "cluster": None,
    "holds": [],
    "canary": [],
    "budget": None,
    "outbreak": None,
    "reload": {"successful": False},
    "alarms": [
        {"name": "no-upstream", "severity": "critical", "text": "no upstream answers \x1b[2J"}
        | {"what_to_do": "Look at the WAN."}
    ],
}


LATEST = "10.0.0.7 (12 s ago), 10.0.0.8 (1 h ago)"


def entry(number, *, pinned=False):
    return {
        "key": f"any/any/{{AB}}/1/full{number}.zip",
        "product": "{AB}" if number else "Virus [bold] Definitions",
        "stream": "{AB}",
        "revision": "1",
        "content_revision": None,
        "length_bytes": 1_500_000,
        "kind": "full",
        "hits": number,
        "used_at": 0.0,
        "pinned": pinned,
    }


ENTRIES = [entry(number, pinned=number == 1) for number in range(2500)]


PROBLEMS: list[str] = []
CHANGED: list[str] = []
WAITING: list[str] = []


def control_plane(method, url):  # noqa: PLR0911 - a case for each request
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    match method, unquote(url.path):
        case "GET", "/api/v1/status":
            return 200, STATUS
        case "GET", "/api/v1/content":
            start = int(query.get("cursor", "0"))
            end = start + int(query["limit"])
            found = [] if query.get("product") == "none" else ENTRIES
            cursor = str(end) if end < len(found) else None
            return 200, {"entries": found[start:end], "cursor": cursor, "matching": len(found)}
        case "DELETE", "/api/v1/content":
            done = {"dry_run": query["dry_run"] == "1", "entries": 7, "freed_bytes": 1_500_000, "pinned": 2}
            return 200, done | {"busy": int(query.get("kind") == "full")}
        case "POST", "/api/v1/reload":
            told = {"reloaded": not PROBLEMS, "problems": PROBLEMS, "changed": CHANGED, "waiting": WAITING}
            return 200, told
        case "POST", "/api/v1/upgrade":
            return 200, {"upgraded": not PROBLEMS, "problems": PROBLEMS, "pid": 7, "workers": [8, 9]}
        case "DELETE", "/api/v1/content/any/any/{AB}/1/full1.zip":
            return 200, {"key": "any/any/{AB}/1/full1.zip", "freed_bytes": 1_500_000}
        case "DELETE", "/api/v1/content/any/any/{AB}/1/arriving.zip":
            return 200, {"key": "any/any/{AB}/1/arriving.zip", "freed_bytes": 0, "unconfirmed": ["b", "c"]}
        case "PUT" | "DELETE", "/api/v1/content/any/any/{AB}/1/full1.zip/pin":
            return 200, {"key": "any/any/{AB}/1/full1.zip", "pinned": method == "PUT"}
    return 404, {"status": 404, "title": "Not Found", "detail": f"There is no {unquote(url.path)}"}


@pytest.fixture
def plane():
    """Answers as the control plane does; what `answers` gives is sent as JSON, bytes as they are."""

    def reply(request):
        status, body = plane.answers(request.method, urlsplit(request.path))
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send(ok(text).replace(b"200 OK", f"{status} Told".encode(), 1))

    with RawUpstream(reply) as plane:
        plane.answers = control_plane
        yield plane


def asked(plane):
    return [f"{request.method} {request.path}" for request in plane.seen]


def test_status_in_words(plane):
    result = run("status", "--admin", plane.url)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:9] == [
        "gup 0.1.0 at lyon: ready, up 3 h 5 min",
        "since install: 1.0 TB to clients, 5.0 GB over the WAN, 995 GB saved (99.5%), 98.8% hits",
        "since start: 0 B to clients, 0 B over the WAN, 0 B saved",
        "cache: 12 entries, 3.0 GB of 20.0 GB, 100 GB free on disk",
        "WAN: 8MB/s",
        "requests since start: 1207 (1200 hit, 4 miss, 3 refused)",
        f"clients: 42 connections; seen: 3 in 1h, 40 in 1d, 55 in 7d; the last: {LATEST}",
        "the last reload FAILED: the old settings are in force; `gup config check` lists the mistakes",
        "CRITICAL no-upstream: no upstream answers \N{REPLACEMENT CHARACTER}[2J. Look at the WAN.",
    ]
    assert [line.split()[:2] for line in lines[9:12]] == [
        ["upstream", "since"],
        ["hq", "up"],
        ["spare", "DOWN"],
    ]
    assert lines[11].rstrip().endswith("refused \N{REPLACEMENT CHARACTER}[2J")
    assert lines[12].split() == ["fill", "from", "received", "rate", "time", "left"]
    assert lines[13].split("  ")[0] == "any/any/x/1/full.zip"
    assert lines[13].split()[2:] == ["25", "B", "of", "100", "B", "(25%)", "5", "B", "15", "s"]
    assert lines[14].split() == ["0e", "-", "1.5", "kB", "-", "-"]
    assert lines[15].split() == ["last", "failures", "problem", "detail", "content"]
    assert lines[16].split()[2:6] == ["upstream-timeout", "15", "s", "\N{REPLACEMENT CHARACTER}"]
    assert len(lines) == 15 + 1 + 5 + 1
    assert lines[-1] == "and 2 more: gup status --json; gup why KEY explains one"


def test_status_as_json(plane):
    assert json.loads(run("status", "--json", "--admin", plane.url).stdout) == STATUS


AWAY = "; the site's WAN rate is 8MB/s, no share of it granted here; the engine does NOT answer (no)"


@pytest.mark.parametrize(
    ("share", "rate", "error", "words"),
    [
        (3_000_000, 8_000_000, None, "; the site's WAN rate is 8MB/s, 3MB/s of it here"),
        (None, 8_000_000, "no", AWAY),
        (None, None, None, ""),
    ],
)
def test_a_cluster_in_a_line(share, rate, error, words):
    def member(name, *, askable, part=5):
        return {"name": name, "askable": askable, "share_bytes_per_second": part}

    cluster = {"site": "lyon", "node": "b", "engine_error": error, "wan_rate_bytes_per_second": rate}
    alone = cluster | {"members": [member("b", askable=True, part=share)]}
    assert cluster_line(alone) == "cluster lyon: b with no other member" + words
    others = [member("a", askable=True), *alone["members"], member("c", askable=False)]
    line = "cluster lyon: b with a, c (not asked)" + words
    sums = {"sent_bytes": 4000, "received_bytes": 1000, "saved_bytes": 3000, "between_members_bytes": 2000}
    lines = list(status_lines(STATUS | {"cluster": cluster | {"members": others, "sums": sums}}))
    assert line in lines
    flow = "4.0 kB to clients, 1.0 kB over the WAN, 3.0 kB saved (75.0%), 2.0 kB from one to another"
    assert f"all gups: {flow}" in lines


def test_an_unlimited_wan_and_a_quiet_service():
    quiet = STATUS | {
        "wan_rate_bytes_per_second": None,
        "fills": [],
        "ready": False,
        "reload": {"successful": True},
        "alarms": [],
        "budget": None,
        "outbreak": None,
        "clients": {"connections": 0, "seen": {"1h": 0}, "latest": []},
    }
    lines = list(status_lines(quiet))
    assert "clients: 0 connections; seen: 0 in 1h" in lines
    assert "WAN: unlimited" in lines
    assert "not ready" in lines[0]
    assert not any("FAILED" in line for line in lines)


def test_a_budget_in_words():
    outbreak = {"until": 4600.0, "left_seconds": 3600.0, "by": "ann", "reason": "worm \x1b[2J"}
    saying = "31.2 GB of 50.0 GB used this month (62%); it runs out on the 23rd"
    lines = list(status_lines(STATUS | {"budget": {"saying": saying}, "outbreak": outbreak}))
    line = next(line for line in lines if line.startswith("OUTBREAK"))
    assert "1 h left, by ann: worm \N{REPLACEMENT CHARACTER}[2J" in line
    assert f"WAN budget: {saying}" in lines
    kinds = {"full": 2_000_000, "delta": 1000, "index": 0, "other": 0}
    held = {"background": 2, "full": 1, "delta": 0}
    told = {
        "saying": "3.0 MB this month",
        "period_began_at": 0.0,
        "period_ends_at": 86400.0,
        "left_bytes": 1_000_000,
        "by_kind": kinds,
        "background_bytes": 500,
        "cheap_bytes": 7000,
        "cheap_now": True,
        "forecast": {"basis": "days", "days": 3, "expected_bytes": 9_000_000},
        "held_back_total": held,
        "held_back": ["background"],
    }
    text = "\n".join(budget_lines(told))
    for words in (
        "1.0 MB left",
        "2.0 MB full, 1.0 kB delta, 0 B index, 0 B other; 500 B of them prefetched",
        "not counted: 7.0 kB, now",
        "forecast: 9.0 MB at the period's end, judged by 3 days",
        "2 background, 1 full, 0 delta; now: background",
    ):
        assert words in text
    early = told | {"forecast": {"basis": "none"}, "left_bytes": None, "cheap_bytes": 0, "cheap_now": False}
    assert "too early to tell" in "\n".join(budget_lines(early | {"held_back": []}))


def test_the_control_plane_is_found_by_the_settings(plane, tmp_path, monkeypatch):
    file = tmp_path / "gup.toml"
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length")
    file.write_text(
        f'[listen]\nadmin_address = "0.0.0.0"\nadmin_port = {plane.port}\nadmin_token_file = "{token}"\n'
    )
    assert run("status", "--config", file).exit_code == 0
    monkeypatch.setenv("GUP_ADMIN", plane.url)
    assert run("status").exit_code == 0
    assert asked(plane) == ["GET /api/v1/status"] * 2


@pytest.mark.parametrize(
    ("address", "url"),
    [("0.0.0.0", "http://127.0.0.1:2968"), ("::", "http://[::1]:2968"), ("10.0.0.1", "http://10.0.0.1:2968")],
)
def test_where_the_control_plane_is(address, url):
    listen = {"admin_address": address, "admin_token_file": "/etc/gup/token"}
    assert admin_url(Settings.model_validate({"listen": listen})) == url
    listen |= {"admin_cert_file": "/etc/gup/cert.pem", "admin_key_file": "/etc/gup/key.pem"}
    assert admin_url(Settings.model_validate({"listen": listen})) == url.replace("http:", "https:")


def test_a_web_proxy_of_the_environment_has_no_part_in_it(plane, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert run("status", "--admin", plane.url.removeprefix("http://")).exit_code == 0


def test_nobody_listens_there():
    result = run("status", "--admin", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "no control plane answers at http://127.0.0.1:1 (" in result.stderr
    assert "Connection refused" in result.stderr
    assert "is it running?" in result.stderr


def test_another_server_listens_there(plane):
    plane.answers = lambda *_: (200, b"<html>")
    result = run("status", "--admin", plane.url)
    assert (result.exit_code, result.stderr) == (
        1,
        f"gup: {plane.url}: the server there is not a gup control plane\n",
    )
    plane.answers = lambda *_: (200, [])
    assert "not a gup control plane" in run("status", "--admin", plane.url).stderr
    plane.answers = lambda *_: (502, b"<html>")
    assert "502" in run("status", "--admin", plane.url).stderr


def test_a_gup_of_another_version_listens_there(plane):
    plane.answers = lambda *_: (200, {"site": "x"})
    result = run("status", "--admin", plane.url)
    assert result.exit_code == 1
    assert "another version" in result.stderr


def test_an_odd_url_is_refused():
    with pytest.raises(AdminError, match="must begin with http://"):
        Admin("ftp://x")
    assert "no control plane answers" in run("status", "--admin", "http://[::1").stderr


@pytest.mark.parametrize(
    ("serving", "leaving", "words"),
    [
        (1, 1, "1 new worker; 1 earlier one finishes its responses"),
        (2, 3, "2 new workers; 3 earlier ones finish their responses"),
        (4, 0, "4 new workers"),
    ],
)
def test_upgrade_says_which_version_serves(plane, serving, leaving, words):
    row = {"slot": 0, "pid": 8, "up_since": 0.0, "ready": True, "leaving": False}
    told = iter(
        [
            {"version": "1", "pid": 7, "workers": [row]},
            {"version": "1", "pid": 7, "workers": [row | {"leaving": True}, row | {"pid": 10}]},
            {"version": "2", "pid": 11, "workers": [row | {"pid": 10, "ready": False}]},
            {"version": "2", "pid": 11, "workers": [row | {"leaving": True}] * leaving + [row] * serving},
        ]
    )
    plane.answers = lambda method, url: (200, next(told)) if method == "GET" else control_plane(method, url)
    result = run("upgrade", "--admin", plane.url)
    assert (result.exit_code, result.stdout) == (0, f"gup 2 serves with {words}\n")


def test_upgrade_says_why_the_new_version_can_not_take_over(plane, monkeypatch):
    monkeypatch.setitem(globals(), "PROBLEMS", ["SyntaxError: invalid syntax"])
    result = run("upgrade", "--admin", plane.url)
    assert result.exit_code == 1
    assert "earlier processes go on serving:\n  SyntaxError: invalid syntax\n" in result.stderr
    assert json.loads(run("upgrade", "--admin", plane.url, "--json").stdout)["upgraded"] is False


def test_reload_says_what_came_of_it(plane, monkeypatch):
    assert run("reload", "--admin", plane.url).stdout == "nothing has changed\n"
    assert asked(plane) == ["POST /api/v1/reload"]
    monkeypatch.setitem(globals(), "CHANGED", ["wan.rate", "upstream"])
    result = run("reload", "--admin", plane.url)
    assert (result.exit_code, result.stdout) == (0, "in force now: wan.rate, upstream\n")
    monkeypatch.setitem(globals(), "WAITING", ["listen.port", "workers.count"])
    result = run("reload", "--admin", plane.url)
    assert (result.exit_code, result.stdout.splitlines()[1:]) == (
        3,
        ["restart the service for: listen.port, workers.count"],
    )
    monkeypatch.setitem(globals(), "PROBLEMS", ["wan.rate: 'x' is no rate"])
    result = run("reload", "--admin", plane.url)
    assert (result.exit_code, "  wan.rate: 'x' is no rate" in result.stderr) == (1, True)
    result = run("reload", "--admin", plane.url, "--json")
    assert (result.exit_code, json.loads(result.stdout)["problems"]) == (1, PROBLEMS)


@pytest.mark.parametrize("wrong", ['rate = "much"', "rate ="])
def test_a_broken_file_hides_no_running_service(plane, tmp_path, monkeypatch, wrong):
    file = tmp_path / "gup.toml"
    file.write_text(f"[listen]\nadmin_port = {plane.port}\n[wan]\n{wrong}\n")
    monkeypatch.setenv("GUP_LISTEN__ADMIN_PORT", str(plane.port))  # of what is no TOML nothing can be read
    result = run("status", "--config", file)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "gup 0.1.0 at lyon: ready, up 3 h 5 min")
    (told,) = result.stderr.splitlines()
    assert told.startswith("gup: warning: ")
    assert str(file) in told


# --- tokens


def settings_file(tmp_path, plane, token_file=None):
    file = tmp_path / "gup.toml"
    named = f'admin_token_file = "{token_file}"\n' if token_file else ""
    file.write_text(f'[listen]\nadmin_port = {plane.port}\n{named}[cache]\ndirectory = "{tmp_path}/cache"\n')
    return file


def test_the_token_is_that_of_the_flag_else_of_the_settings_else_the_one_left_in_run(plane, tmp_path):
    (tmp_path / "cache" / "run").mkdir(parents=True)
    (tmp_path / "cache" / "run" / "admin-token").write_text("local-token\n")
    for name in ("named", "given"):
        (tmp_path / name).write_text(f"{name}-token\n")
    plain, named = settings_file(tmp_path, plane), tmp_path / "named"
    assert run("reload", "--config", plain).exit_code == 0
    settings_file(tmp_path, plane, named)
    assert run("reload", "--config", plain).exit_code == 0
    assert run("reload", "--config", plain, "--token-file", tmp_path / "given").exit_code == 0
    assert run("reload", "--admin", plane.url, "--token-file", tmp_path / "given").exit_code == 0
    assert run("reload", "--admin", plane.url).exit_code == 0
    assert [request.header("authorization") for request in plane.seen] == [
        *("Bearer local-token", "Bearer named-token", "Bearer given-token", "Bearer given-token", None)
    ]


def test_what_lacks_for_a_token_is_told(plane, tmp_path):
    plane.answers = lambda *_: (401, {"detail": "Changing needs a token"})
    told = run("reload", "--config", settings_file(tmp_path, plane)).stderr
    assert "Changing needs a token" in told
    assert f"'{tmp_path}/cache/run/admin-token' can't be read: No such file" in told
    assert "(gup's commands: --token-file)" in run("reload", "--admin", plane.url).stderr
    missing = run("reload", "--admin", plane.url, "--token-file", tmp_path / "none")
    assert (missing.exit_code, "--token-file: " in missing.stderr) == (1, True)


def test_cache_list_shows_rows(plane):
    result = run("cache", "list", "--admin", plane.url, "--limit", 2)
    assert result.exit_code == 0, result.output
    head, first, second = result.stdout.splitlines()
    assert head.split() == ["product", "revision", "kind", "size", "hits", "last", "used", "key"]
    assert first.startswith("Virus [bold] Definitions  1 ")
    assert "  full  1.5 MB  " in first
    assert first.rstrip().endswith("any/any/{AB}/1/full0.zip")
    assert "pinned" not in first
    assert " pinned " in second
    assert first.index("any/any") == second.index("any/any") == head.index("key")


def test_cache_list_follows_the_pages(plane):
    result = run("cache", "list", "--admin", plane.url, "--json", "--limit", 0)
    assert [json.loads(line) for line in result.stdout.splitlines()] == ENTRIES
    assert len(asked(plane)) == 3
    plane.seen.clear()
    result = run("cache", "list", "--admin", plane.url, "--json", "--limit", 1100)
    assert len(result.stdout.splitlines()) == 1100
    limits = [parse_qs(urlsplit(line.split()[1]).query)["limit"] for line in asked(plane)]
    assert limits == [["1000"], ["100"]]


def test_cache_list_passes_its_filters_on(plane):
    run(
        *("cache", "list", "--admin", plane.url, "--version", "14.3", "--language", "fr", "--stream", "{AB}"),
        *("--kind", "delta", "--order", "-used", "--product", "Virus", "--revision", "1"),
    )
    assert parse_qs(urlsplit(asked(plane)[0].split()[1]).query) == {
        "version": ["14.3"],
        "language": ["fr"],
        "stream": ["{AB}"],
        "kind": ["delta"],
        "product": ["Virus"],
        "revision": ["1"],
        "order": ["-used"],
        "limit": ["100"],
    }


def test_purge_pin_and_unpin(plane):
    key = "any/any/{AB}/1/full1.zip"
    assert run("cache", "purge", key, "--admin", plane.url).stdout == f"purged {key}: 1.5 MB\n"
    assert run("cache", "pin", key, "--admin", plane.url).stdout == f"pinned {key}\n"
    assert run("cache", "unpin", key, "--admin", plane.url).stdout == f"unpinned {key}\n"
    target = "/api/v1/content/any/any/%7BAB%7D/1/full1.zip"
    assert asked(plane) == [f"DELETE {target}", f"PUT {target}/pin", f"DELETE {target}/pin"]


def test_a_purge_of_what_is_not_stored_here_says_what_it_holds_for(plane):
    key = "any/any/{AB}/1/arriving.zip"
    assert run("cache", "purge", key, "--admin", plane.url).stdout == (
        f"purged {key}: 0 B; a fetch of it under way is not stored; not confirmed yet by b, c\n"
    )
    dry = run("cache", "purge", "--admin", plane.url, "--product", "Virus", "--dry-run")
    assert dry.stdout.splitlines()[-1] == (
        "7 entries would be purged, 1.5 MB, 2 left: pinned; matching fetches under way would not be stored"
    )


def test_a_list_that_finds_nothing_says_so(plane):
    result = run("cache", "list", "--admin", plane.url, "--product", "none")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "no entry matches: 2500 are stored\n"


def test_a_purge_of_what_flags_choose_tells_how_much_and_first_what(plane):
    result = run(
        "cache", "purge", "--admin", plane.url, "--product", "Virus", "--older-than", "30d", "--dry-run"
    )
    lines = result.stdout.splitlines()
    assert (result.exit_code, len(lines)) == (0, 1 + 20 + 2), result.output
    assert lines[-2:] == ["and 2480 more", "7 entries would be purged, 1.5 MB, 2 left: pinned"]
    listed, purged = (parse_qs(urlsplit(line.split()[1]).query) for line in reversed(asked(plane)))
    chosen = {"product": ["Virus"], "older_than": ["2592000"]}
    assert listed == chosen | {"order": ["name"], "limit": ["20"]}
    assert purged == chosen | {"dry_run": ["1"], "pinned": ["0"]}
    plane.seen.clear()
    result = run("cache", "purge", "--admin", plane.url, "--kind", "full", "--pinned")
    assert result.stdout == (
        "7 entries purged, 1.5 MB, 2 left: pinned, 1 left: being fetched or checked; "
        "matching fetches under way are not stored\n"
    )
    assert (result.exit_code, asked(plane)) == (1, ["DELETE /api/v1/content?kind=full&dry_run=0&pinned=1"])


@pytest.mark.parametrize("arguments", [(), ("k", "--kind", "full"), ("k", "--dry-run"), ("--dry-run",)])
def test_a_purge_names_its_keys_or_chooses(plane, arguments):
    result = run("cache", "purge", "--admin", plane.url, *arguments)
    assert (result.exit_code, asked(plane)) == (2, [])
    assert "give keys or filters" in result.stderr


def test_the_newest_of_a_product_is_ordered(plane):
    row = {"key": "a/b/c/d/e", "outcome": "queued", "detail": ""}
    plane.answers = lambda *_: (202, {"wanted": [row]})
    result = run("prefetch", "--admin", plane.url, "--product", "Virus", "--language", "fr", "--no-wait")
    assert (result.exit_code, result.stdout) == (0, "a/b/c/d/e: waits\n")
    assert asked(plane) == ["POST /api/v1/prefetch"]
    assert run("prefetch", "--admin", plane.url).exit_code == 2


@pytest.mark.parametrize("stored", [True, False])
def test_why_tells_what_is_known(plane, stored):
    file = {"key": "a/b/c/d/e", "stored": stored, "said": ["Not stored.", "A fill failed \x1b."]}
    plane.answers = lambda *_: (200, {"files": [file]})
    result = run("why", "/content/{A}/1/full.zip", "--admin", plane.url)
    assert result.stdout == "a/b/c/d/e\n  Not stored.\n  A fill failed \N{REPLACEMENT CHARACTER}.\n"
    assert (result.exit_code, asked(plane)) == (
        int(not stored),
        ["GET /api/v1/why?of=%2Fcontent%2F%7BA%7D%2F1%2Ffull.zip"],
    )


def test_a_refusal_is_told_in_its_own_words(plane):
    result = run("cache", "purge", "no/such/key/at/all", "--admin", plane.url)
    assert result.exit_code == 1
    assert result.stderr == f"gup: {plane.url}: There is no /api/v1/content/no/such/key/at/all\n"


# --- verify


def progress(*, running: bool, found: int = 0, mended: bool | None = None) -> dict:
    row = {"where": "body", "path": "content/x", "key": "x", "detail": "1 of 4 chunks", "mended": mended}
    return {
        "running": running,
        "repair": mended is not None,
        "failed": None,
        "checked": 7,
        "total": 7,
        "busy": 1,
        "damaged": found,
        "mended": found if mended else 0,
        "found": [row | {"why_not": None if mended else "nobody there"}] * found,
    }


@pytest.mark.parametrize(
    ("arguments", "found", "mended", "status", "line"),
    [
        ((), 0, None, 0, "7 checked: 0 damaged, 1 left out because of fills"),
        ((), 1, None, 1, "body: content/x: 1 of 4 chunks\n"),
        (("--repair",), 1, True, 0, "body: content/x: 1 of 4 chunks (repaired)\n"),
        (("--repair",), 1, False, 1, "body: content/x: 1 of 4 chunks (NOT repaired: nobody there)\n"),
    ],
)
def test_verify_waits_for_the_service_and_tells_what_it_found(
    plane, monkeypatch, arguments, found, mended, status, line
):
    monkeypatch.setattr("gup.cli.cache_commands._POLL_SECONDS", 0.0)

    def answers(method, *_):
        running = len(plane.seen) < 4
        status = 202 if method == "POST" else 200
        return status, progress(running=running, found=0 if running else found, mended=mended)

    plane.answers = answers
    result = run("cache", "verify", "--admin", plane.url, *arguments)
    assert (result.exit_code, line in result.stdout) == (status, True), result.output
    verify = "/api/v1/verify"
    assert asked(plane) == [f"POST {verify}?repair={int(bool(arguments))}", *[f"GET {verify}"] * 3]


def test_verify_here_refuses_what_is_no_cache_directory(tmp_path):
    result = run("cache", "verify", "--cache-dir", tmp_path)
    assert result.exit_code == 1
    assert "is no cache directory" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_goes_to_the_directory_of_the_settings_when_nobody_serves(tmp_path):
    (tmp_path / "content").mkdir()
    settings = tmp_path / "gup.toml"
    settings.write_text(f'[cache]\ndirectory = "{tmp_path}"\n[listen]\nadmin_port = 1\n')
    result = run("cache", "verify", "--config", settings, "--json")
    assert (result.exit_code, json.loads(result.stdout)["damaged"]) == (0, 0), result.output
    told = run("cache", "verify", "--config", settings, "--admin", "http://127.0.0.1:1").stderr
    assert "no control plane answers" in told


HELD = {
    "stream": "{535CB6A4-441F-4E8A-A897-804CD859100E}",
    "product": "Virus Definitions",
    "revision": "260801002",
    "held_by": "ann",
    "held_at": 0.0,
    "reason": "crashes \x1b clients",
    "except_subnets": ["10.1.0.0/16"],
    "newest": None,
}


def test_what_is_on_hold_in_a_line():
    line = hold_line(HELD)
    assert line.startswith("Virus Definitions 260801002, except for 10.1.0.0/16, since 19")
    assert line.endswith(", by ann: crashes \x1b clients")
    assert hold_line(HELD | {"reason": "", "held_by": "", "except_subnets": []}).endswith(": no reason given")
