"""Settings: what is read from where, what is refused and with which words."""

import json
import socket

import pytest
from pydantic import ValidationError

from gup.config import Settings, Upstream, load, read
from gup.errors import SettingsError


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "gup.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(file=None, *, environment=None, flags=None):
    with pytest.raises(SettingsError) as caught:
        load(file, environment=environment or {}, flags=flags)
    return caught.value.problems


# --- defaults


def test_nothing_given_means_the_defaults_which_pass_their_own_checks():
    settings = load(environment={})
    assert settings == Settings() == Settings.model_validate(settings.model_dump(by_alias=True))
    assert (settings.upstream, settings.listen.port, settings.worker_count >= 1) == ([], 2967, True)
    assert (settings.cache.max_size, settings.wan.rate) == (20_000_000_000, 8_000_000)
    with pytest.raises(ValidationError):
        settings.cache.max_size = 5


def test_site_name_is_the_host_name_made_a_token(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "büro nord.example")
    assert Settings().site.name == "b-ro-nord.example"
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    assert Settings().site.name == "gup"


# --- who wins


def test_environment_wins_over_the_file_and_flags_over_both(toml):
    file = toml('[listen]\nport = 1\nadmin_port = 2\nbacklog = 3\naddress = "127.0.0.1"\n')
    environment = {"GUP_LISTEN__PORT": "11", "GUP_LISTEN__ADMIN_PORT": "12"}
    listen = load(file, environment=environment, flags={"listen": {"port": 21}}).listen
    assert (listen.port, listen.admin_port, listen.backlog, listen.address) == (21, 12, 3, "127.0.0.1")


def test_lists_are_replaced_whole(toml):
    file = toml('[[upstream]]\nurl = "http://a:1"\n[[upstream]]\nurl = "http://b:2"\n')
    assert [u.name for u in load(file, environment={}).upstream] == ["a:1", "b:2"]
    flags = {"upstream": [{"url": "http://c:3"}]}
    assert [u.name for u in load(file, environment={}, flags=flags).upstream] == ["c:3"]
    environment = {"GUP_UPSTREAM": "http://d:4, https://e"}
    assert [u.url for u in load(file, environment=environment).upstream] == ["http://d:4", "https://e"]


def test_lists_and_tables_from_the_environment():
    settings = load(
        environment={
            "GUP_CLIENTS__ALLOW": "10.0.0.0/8, fe80::/10",
            "GUP_RULES__CONTENT_TYPES": '["a", "b"]',
            "GUP_UPSTREAM__URL": "http://m:8014/base/",
            "GUP_UPSTREAM__HEADERS": '{"X-Site": "1"}',
            "gup_log__level": "debug",
            "GUP_LISTEN__PORT": "",  # empty is not given
        }
    )
    assert settings.clients.allow == ["10.0.0.0/8", "fe80::/10"]
    assert settings.rules.content_types == ["a", "b"]
    assert settings.upstream[0].url == "http://m:8014/base"
    assert settings.upstream[0].headers == {"X-Site": "1"}
    assert settings.log.level == "debug"
    assert settings.listen.port == 2967


def test_upstreams_as_json_and_as_one_table(toml, monkeypatch):
    (upstream,) = load(environment={"GUP_UPSTREAM": '[{"url": "http://m:1", "priority": 3}]'}).upstream
    assert (upstream.url, upstream.priority) == ("http://m:1", 3)
    assert load(toml('[upstream]\nurl = "http://m:1"\n'), environment={}).upstream[0].name == "m:1"
    assert Upstream(url="http://m:1", name="hq").name == "hq", "a name wins over the URL"
    assert Upstream(url="http://[::1]:8014/x").name == "[::1]:8014"
    monkeypatch.setenv("GUP_SITE__NAME", "lyon")
    assert load().site.name == "lyon", "the process's environment is the default"


def test_what_a_container_platform_sets_is_left_alone():
    environment = {"GUP_PORT": "tcp://10.0.0.1:2967", "GUP_SERVICE_HOST": "10.0.0.1", "GUP_CONFIG": "/x"}
    assert load(environment=environment) == Settings()


def test_settings_survive_the_way_to_a_child(toml):
    file = toml(
        """
        [site]
        name = "lyon"
        [[upstream]]
        url = "https://[fd00::1]:8443/sub"
        version = "14.3 RU2"
        language = "French"
        headers = {Authorization = "Bearer s3cret"}
        proxy = "http://user:pa55@proxy:8080"
        [[wan.schedule]]
        days = ["mon", "fri"]
        from = "07:30"
        to = "24:00"
        rate = "1MB/s"
        """
    )
    settings = load(file, environment={})
    sent = json.dumps(settings.model_dump(mode="json", by_alias=True))
    assert Settings.model_validate(json.loads(sent)) == settings
    assert "s3cret" in sent
    assert "s3cret" not in repr(settings)
    assert "pa55" not in repr(settings)


def test_paths_are_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load(environment={"GUP_CACHE__DIRECTORY": "store"}).cache.directory == tmp_path / "store"


# --- what is wrong, and the words for it


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[cache]\nmax_sise = 5", ["cache.max_sise", "unknown key", "did you mean max_size?"]),
        ("[cache]\nzzz = 5", ["cache.zzz", "unknown key", "max_part_age"]),
        ("[nonsense]\nx = 5", ["nonsense", "unknown key", "listen, cache, upstream"]),
        ('[cache]\nmax_size = "20 apples"', ["cache.max_size", "'20 apples'", '"20GB"']),
        ('[cache]\nmax_size = "20kB"', ["cache.max_size", "'20kB'", "at least"]),
        ('[cache]\nmax_unused = "long"', ["cache.max_unused", "'long'", '"30d"']),
        ('[cache]\nverify = "never"', ["cache.verify", "'never'", "'first_use'"]),
        ("[cache]\ndirectory = 5", ["cache.directory", "5", "a path"]),
        ("cache = 5", ["cache", "5", "a table"]),
        ("[reports]\nprice_per_gb = -1", ["reports.price_per_gb", "-1", '"0.08"']),
        ("[reports]\nprice_per_gb = 0.12345678", ["reports.price_per_gb", "6 after the point"]),
        ("[reports]\nprice_per_gb = inf", ["reports.price_per_gb", "an amount"]),
        ('[reports]\ncurrency = "a b"', ["reports.currency", "without spaces"]),
        ('[wan]\nrate = "8"', ["wan.rate", "'8'", '"8MB/s"']),
        ('[wan]\nrate = "8B/s"', ["wan.rate", "'8B/s'", "1kB/s"]),
        ("[listen]\nport = 70000", ["listen.port", "70000", "65535"]),
        ("[listen]\nport = true", ["listen.port", "true", "whole number"]),
        ("[listen]\nport = 1.5", ["listen.port", "1.5", "whole number"]),
        ('[listen]\nport = "http"', ["listen.port", "'http'", "whole number"]),
        ('[listen]\naddress = "site"', ["listen.address", "'site'", "IP address"]),
        ('[listen]\nread_timeout = "5s"', ["listen.read_timeout", "unknown key", "did you mean"]),
        ("[listen]\nidle_timeout = 0", ["listen.idle_timeout", "0", "greater than 0"]),
        ("[listen]\nport = 99\nadmin_port = 99", ["listen.admin_port", "99", "must differ"]),
        ("[[upstream]]\npriority = 1", ["upstream#1.url", "missing", "http://"]),
        ('[[upstream]]\nurl = "m:8014"', ["upstream#1.url", "'m:8014'", "http://host:port"]),
        ('[[upstream]]\nurl = "http://m:0"', ["upstream#1.url", "http://host:port"]),
        ('[[upstream]]\nurl = "http://m:70000"', ["upstream#1.url", "http://host:port"]),
        ('[[upstream]]\nurl = "http://m/?q"', ["upstream#1.url", "without user or query"]),
        (
            '[[upstream]]\nurl = "http://m"\nkind = "sql"',
            ["upstream#1.kind", "'manager', 'liveupdate' or 'gup'"],
        ),
        (
            '[[upstream]]\nurl = "http://m"\nverify_tls = "perhaps"',
            ["upstream#1.verify_tls", "true or false"],
        ),
        ('[[upstream]]\nurl = "http://m"\nlanguage = "../x"', ["upstream#1.language", "'../x'"]),
        ('[[upstream]]\nurl = "http://m"\nname = \'a"b\'', ["upstream#1.name", "printable"]),
        (
            '[[upstream]]\nurl = "http://m"\nheaders = {Host = "x"}',
            ["upstream#1.headers", "set by gup itself"],
        ),
        (
            '[[upstream]]\nurl = "http://m"\nheaders = {"a b" = "x"}',
            ["upstream#1.headers", "name of a header"],
        ),
        ('[[upstream]]\nurl = "http://m"\nheaders = {A = "x\\ny"}', ["upstream#1.headers", "printable"]),
        ('[[upstream]]\nurl = "http://m"\n[[upstream]]\nurl = "https://m"', ["upstream", "'m'", "2 times"]),
        ('[clients]\nallow = ["10.0.0.1/8"]', ["clients.allow#1", "'10.0.0.1/8'", "10.0.0.0/8"]),
        ("[clients]\nallow = 5", ["clients.allow", "5", "a list"]),
        ('[site]\nname = "a b"', ["site.name", "'a b'", "letters"]),
        ('[site]\ntime_zone = "Paris"', ["site.time_zone", "'Paris'", "Europe/Paris"]),
        ("[workers]\ncount = -1", ["workers.count", "-1", "greater than or equal to 0"]),
        ("[cache]\nindex_ttl = " + "9" * 400, ["cache.index_ttl", "bits", "100 years"]),
        ("[listen]\nport = 0x" + "f" * 6000, ["listen.port", "24000 bits", "65535"]),
        ("a = " + "[" * 5000, ["gup.toml", "nested 16 levels deep"]),
        ("a = " + "[" * 17 + "]" * 17, ["gup.toml", "nested 16 levels deep"]),
        (".".join("a" * 5000) + " = 1", ["gup.toml", "nested 16 levels deep"]),
        ('"\\u001b[31m" = 1', [r"\x1b[31m", "unknown key"]),
        *(
            (f'[{section}]\n{key} = "a\\u0000b"', [f"{section}.{key}", r"\x00", "printable"])
            for section, key in (
                ("cache", "directory"),
                ("catalog", "file"),
                ("listen", "admin_token_file"),
                ("listen", "admin_cert_file"),
            )
        ),
    ],
)
def test_a_mistake_names_key_value_and_what_would_be_right(toml, text, words):
    problems = problems_of(toml(text))
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("GUP_CACHE" + "__A" * 3000, "1", ["GUP_CACHE__A__A", "nested that deep"]),
        ("GUP_UPSTREAM", "[" * 5000, ["upstream", "the JSON text", "must be a list"]),
        ("GUP_CATALOG__TYPES", "[" * 500 + "]" * 500, ["catalog.types", "the JSON text", "must be a table"]),
        ("GUP_CACHE__DIRECTORY", "/\udcff", ["cache.directory", r"\udcff", "printable"]),
        ("GUP_\udcff__PORT", "1", [r"GUP_\xff__PORT", "unknown section"]),
    ],
)
def test_a_variable_that_holds_anything_is_a_mistake_in_printable_words(name, text, words):
    (problem,) = problems_of(environment={name: text})
    assert problem.isprintable()
    for word in words:
        assert word in problem


HOURS = [
    ('from = "18:00"\nto = "18:00"', ["18:00", "24:00"]),
    ('from = "7:30"\nto = "24:00"', ["wan.schedule#1.from", "'7:30'", '"07:30"']),
    ('from = "07:30"\nto = "24:01"', ["wan.schedule#1.to", "'24:01'"]),
]


def test_a_schedules_hours_are_checked_and_its_missing_and_wrong_keys_named(toml):
    for hours, words in HOURS:
        (problem,) = problems_of(toml(f'[[wan.schedule]]\ndays = ["mon"]\nrate = "1MB/s"\n{hours}\n'))
        assert [word for word in words if word not in problem] == []
    problems = problems_of(toml('[[wan.schedule]]\ndays = ["mon", "tues"]\nrate = "1MB/s"\n'))
    named = [problem.split(":")[0].removeprefix("wan.schedule#1.") for problem in problems]
    assert named == ["days#2", "from", "to"]


BUDGETS = [
    ('bytes = "50"', ["wan.budget.bytes", "'50'", "1kB"]),
    ('bytes = "-1GB"', ["wan.budget.bytes"]),
    ('per = "week"', ["wan.budget.per", "'week'", "'month' or 'day'"]),
    ("begins = 0", ["wan.budget.begins", "0"]),
    ("begins = 32", ["wan.budget.begins", "32"]),
    ("fulls = 90", ["wan.budget.fulls", "90", '"70%"']),
    ('deltas = "1001%"', ["wan.budget.deltas", "1000%"]),
    ('background = "95%"', ["background = 95%, fulls = 90%, deltas = 100%"]),
    ('byte = "1GB"', ["wan.budget.byte", "did you mean bytes?"]),
    ('cheap = [{days = ["mon"], from = "02:00"}]', ["wan.budget.cheap#1.to", "missing"]),
    ('cheap = [{days = [], from = "02:00", to = "03:00"}]', ["wan.budget.cheap#1.days"]),
]


@pytest.mark.parametrize(("line", "words"), BUDGETS)
def test_a_budgets_mistakes_are_told(toml, line, words):
    (problem,) = problems_of(toml(f"[wan.budget]\n{line}\n"))
    assert [word for word in words if word not in problem] == []


def test_a_budget_is_read_from_the_file_and_the_environment(toml):
    hours = '[[wan.budget.cheap]]\ndays = ["sun"]\nfrom = "02:00"\nto = "08:00"\n'
    file = toml('[wan.budget]\nbytes = "50GB"\nfulls = "92.5%"\n' + hours)
    budget = load(file, environment={"GUP_WAN__BUDGET__BEGINS": "12"}).wan.budget
    assert (budget.bytes, budget.fulls, budget.begins, budget.cheap[0].to) == (5 * 10**10, 0.925, 12, "08:00")


def test_all_mistakes_are_told_at_once_with_their_places(toml):
    file = toml('[cache]\nmax_size = "x"\n[log]\nlevel = "loud"\n')
    environment = {
        "GUP_LISTEN__PORT": "x",
        "GUP_WAN__RTE": "1MB/s",
        "GUP_NOPE__X": "1",
        "GUP_LOG_LEVEL": "info",
    }
    problems = problems_of(file, environment=environment, flags={"workers": {"count": -3}})
    text = "\n".join(problems)
    assert len(problems) == 7, text
    assert "cache.max_size: 'x' is not right" in text
    assert f"(from {file})" in text
    assert "(from GUP_LISTEN__PORT)" in text
    assert "wan.rte: unknown key; did you mean rate? (from GUP_WAN__RTE)" in text
    assert "GUP_NOPE__X: unknown section" in text
    assert "GUP_LOG_LEVEL: unknown variable; did you mean GUP_LOG__LEVEL?" in text
    assert "(from the command line)" in text


def test_places_in_lists_are_named_and_what_is_long_or_broken_is_not_shown():
    (problem,) = problems_of(environment={"GUP_CLIENTS__ALLOW": "10.0.0.0/8,nowhere"})
    assert "clients.allow#2" in problem
    assert "(from GUP_CLIENTS__ALLOW)" in problem
    (problem,) = problems_of(environment={"GUP_UPSTREAM": '[{"url": "http://m", "headers": {"A": "s3cret"}'})
    assert "upstream: the JSON text is not right: must be a list" in problem
    (problem,) = problems_of(environment={"GUP_LOG__LEVEL": "x" * 5000})
    assert len(problem) < 250
    (problem,) = problems_of(environment={"GUP_LISTN__PORT": "1"})
    assert problem.startswith("GUP_LISTN__PORT: unknown section")


def test_secrets_are_not_shown_in_complaints(toml):
    problems = problems_of(
        toml(
            '[[upstream]]\nurl = "http://user:s3cret@m"\nproxy = "ftp://u:s3cret@p"\n'
            'headers = {A = "s3cret\\u0007"}\n'
            '[[upstream]]\nurl = "http://m"\nheader = {A = "s3cret"}\n'
        )
    )
    assert len(problems) == 4
    assert "s3cret" not in "\n".join(problems)


def test_a_missing_or_broken_file_is_named(tmp_path, toml):
    (missing,) = problems_of(tmp_path / "none.toml")
    assert "none.toml: can't be read: No such file" in missing
    (broken,) = problems_of(toml("[cache\n"))
    assert "gup.toml: is not TOML:" in broken
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    assert "is not TOML" in problems_of(binary)[0]


def test_without_an_upstream_nothing_can_be_served(toml):
    remedy = ["upstream: none is given; add --upstream http://manager:8014, or an [[upstream]] table"]
    assert read(environment={}, servable=True)[1] == remedy
    assert read(environment={}, flags={"upstream": [{"url": "http://m:8014"}]}, servable=True)[1] == []
    (unread,) = read(toml("[[upstream"), environment={}, servable=True)[1]
    assert "is not TOML" in unread, "it may name one"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("[cache\n", {}),
        ("nonsense = 1\n[listen]\nadmin_port = 5\n", {"listen": {"admin_port": 5}}),
        ('[listen]\nadmin_port = 5\nport = "x"\n', {"listen": {"admin_port": 5}}),
        ('[listen]\nadmin_port = 5\n[clients]\nallow = ["10.0.0.0/8", "x"]\n', {"listen": {"admin_port": 5}}),
        ("[listen]\nadmin_port = 5\n[[upstream]]\npriority = 1\n", {"listen": {"admin_port": 5}}),
        (
            '[[upstream]]\nurl = "http://m"\npriority = "x"\n[[upstream]]\nurl = "http://n"\n',
            {"upstream": [{"url": "http://m"}, {"url": "http://n"}]},
        ),
        (
            '[listen]\nadmin_port = 5\n[[upstream]]\nurl = "http://m"\n[[upstream]]\nurl = "http://m"\n',
            {"listen": {"admin_port": 5}},
        ),
        ("[listen]\nport = 99\nadmin_port = 99\n[cache]\nmin_free = 0\n", {"cache": {"min_free": 0}}),
        (
            '[wan]\nrate = "1MB/s"\nschedule = [{days = ["mon"], rate = "0", from = "1:00", to = "09:00"}]\n',
            {"wan": {"rate": "1MB/s"}},
        ),
    ],
)
def test_what_is_wrong_hides_nothing_that_is_right(toml, text, left):
    settings, problems = read(toml(text), environment={})
    assert len(problems) == 1, problems
    assert settings == Settings.model_validate(left)


def test_addresses_are_normalised_and_equal_ports_of_different_ones_allowed():
    environment = {"GUP_LISTEN__ADDRESS": "localhost", "GUP_LISTEN__ADMIN_ADDRESS": "[::1]"}
    listen = load(environment=environment).listen
    assert (listen.address, listen.admin_address) == ("127.0.0.1", "::1")
    for listen in ({"address": "127.0.0.2", "port": 99, "admin_port": 99}, {"port": 0, "admin_port": 0}):
        assert load(environment={}, flags={"listen": listen}).listen.port == listen["port"]


# --- the cluster

CLUSTER = """
[cluster]
url = "redis://valkey:6379"
site = "lyon"
address = "http://10.0.0.5:2969"
secret_file = "/etc/gup/secret"
"""


def test_a_cluster_needs_its_four_keys_and_has_defaults_for_the_rest(toml, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "gup-1.example")
    cluster = load(toml(CLUSTER), environment={}).cluster
    assert (cluster.node, cluster.listen_address, cluster.member_timeout) == (
        "gup-1.example",
        ("0.0.0.0", 2969),
        5.0,
    )
    assert Settings().cluster.url is None
    for key in ("site", "address", "secret_file"):
        lines = [line for line in CLUSTER.splitlines() if not line.startswith(key)]
        (problem,) = problems_of(toml("\n".join(lines)))
        assert problem.startswith(f"cluster.{key}: missing; with cluster.url it must be ")


def test_without_an_engine_what_only_a_cluster_needs_is_a_mistake(toml):
    problems = problems_of(toml(CLUSTER.replace('url = "redis://valkey:6379"', "")))
    assert [problem.partition(":")[0] for problem in problems] == [
        *("cluster.address", "cluster.secret_file", "cluster.site")
    ]
    assert all("it needs cluster.url" in problem for problem in problems)


@pytest.mark.parametrize("url", ["redis://v", "rediss://v:1", "redis://gup@v:6379/3", "redis://[::1]:6379"])
def test_engines(toml, url):
    assert load(toml(CLUSTER.replace("redis://valkey:6379", url)), environment={}).cluster.url == url


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('url = "http://v"', "redis://host:port or rediss://host:port"),
        ('url = "redis://user:word@v"', "redis://host:port or rediss://host:port"),
        ('address = "https://10.0.0.5:1"', "http://host:port"),
        ('address = "http://10.0.0.5:1/x"', "http://host:port"),
        ('listen = "2969"', "an IP address and a port"),
        ('listen = "gup:2969"', "an IP address and a port"),
        ('listen = "0.0.0.0:99999"', "an IP address and a port"),
        ('listen = "0.0.0.0:2967"', "port 2967 is in [listen] too"),
        ('node = "a b"', "letters, digits, dots, dashes or underscores"),
        ('site = "a:b"', "letters, digits, dots, dashes or underscores"),
        ('member_timeout = "1s"', 'must be at least "2s"'),
        ('sentinels = ["v:26379"]', "cluster.sentinel_name: missing"),
        ('sentinel_name = "gup"', "cluster.sentinels: missing"),
        ('sentinels = ["v"]\nsentinel_name = "gup"', "must be host:port"),
        ('sentinels = ["v:0"]\nsentinel_name = "gup"', "must be host:port"),
    ],
)
def test_mistakes_in_a_cluster_say_what_would_be_right(toml, line, sentence):
    key = line.partition(" ")[0]
    others = [other for other in CLUSTER.splitlines() if other.partition(" ")[0] != key]
    problems = problems_of(toml("\n".join([*others, line])))
    assert any(sentence in problem for problem in problems), problems
    assert not any("word" in problem.replace("password", "") for problem in problems)


def test_addresses_with_ports_in_both_families(toml):
    listen = load(toml(CLUSTER + 'listen = "[::]:3000"\n'), environment={}).cluster
    assert (listen.listen, listen.listen_address) == ("[::]:3000", ("::", 3000))


@pytest.mark.parametrize(
    ("given", "price"), [("0.1", "0.1"), ("1e-05", "0.00001"), ('"12.50"', "12.50"), ("3", "3")]
)
def test_a_price_is_as_it_is_written(toml, given, price):
    """Not the nearest binary fraction of it."""
    settings, problems = read(toml(f"[reports]\nprice_per_gb = {given}\n"), environment={})
    assert (problems, settings.reports.price_per_gb) == ([], price)
