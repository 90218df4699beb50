from urllib.parse import quote, unquote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gup.config import Upstream
from gup.content.key import ABSENT, ContentKey, Kind, Variant
from gup.content.routes import LIVEUPDATE_STREAM, Routes, Target, leads_to, parse_target
from gup.errors import Problem

MIXED = "{535CB6A4-441F-4e8a-A897-804CD859100E}"
UPPER = MIXED.upper()
LOWER = MIXED.lower()
GERMAN = Variant("14.3 RU2", "de")


def slug(call, *arguments):
    with pytest.raises(Problem) as caught:
        call(*arguments)
    return caught.value.slug


# --- targets


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/content/ContentInfo.txt", Target(None, "/content/ContentInfo.txt")),
        (b"/content/a?b=/../c", Target(None, "/content/a")),
        (b"/content/a?", Target(None, "/content/a")),
        (b"/?%zz", Target(None, "/")),
        (b"/content/%7Ba%7d", Target(None, "/content/{a}")),
        (b"/content/{a}", Target(None, "/content/{a}")),
        (b"/content/a%25b%2541", Target(None, "/content/a%b%41")),
        (b"/content/a%20b", Target(None, "/content/a b")),
        (b"/content/%C3%A9", Target(None, "/content/é")),
        (b"/content/folder/", Target(None, "/content/folder/")),
        (b"http://Manager.Example:8014/content/a?x", Target("manager.example:8014", "/content/a")),
        (b"HTTP://manager/content/a", Target("manager:80", "/content/a")),
        (b"https://manager/content/a", Target("manager:443", "/content/a")),
        (b"http://manager:/content/a", Target("manager:80", "/content/a")),
        (b"http://manager", Target("manager:80", "/")),
        (b"http://manager?x", Target("manager:80", "/")),
        (b"http://[::1]:2967/a", Target("[::1]:2967", "/a")),
        (b"http://10.0.0.1:65535/a", Target("10.0.0.1:65535", "/a")),
    ],
)
def test_targets_are_decoded_once(target, expected):
    assert parse_target(target) == expected


@pytest.mark.parametrize(
    "path",
    [
        *b"""
            /content/%00 /content/a%0d%0ab /content/%1f /content/%7f /content/\x7f /content/%C2%85
            /content/%E2%80%AE /content/a\\b /content/a%5Cb /content/../x /content/./x /content/..
            /content/%2e%2E/x /content/.%2e /content/.hidden /content/%2ehidden /content//x
            //content/x /content// /content/a%2Fb /content/a%2fb /content/% /content/%2 /content/%zz
            /content/%u0041 /content/\xff /content/%ff /content/%C0%AE%C0%AE /content/%ED%A0%80
            /content/a#b http://manager/../x http://manager//x
        """.split(),
        b"/content/" + b"a" * 241,
        b"/content/" + b"%C3%A9" * 121,
    ],
)
def test_paths_with_two_meanings_are_refused(path):
    assert slug(parse_target, path) == "bad-path"


@pytest.mark.parametrize(
    "target",
    [
        *b"""
            * manager:443 content/a ftp://manager/a http:/manager/a http:///a http://:80/a
            http://user@manager/a http://user:secret@manager/a http://manager:80:80/a
            http://manager:0/a http://manager:65536/a http://manager:999999/a http://manager:8o/a
            http://[::1/a http://::1/a http://man%61ger/a http://m\xc3\xa4nager/a http://manager#/a
        """.split(),
        b"",
        b"http://man ager/a",
    ],
)
def test_other_forms_are_refused(target):
    assert slug(parse_target, target) == "bad-request"


def test_a_name_of_240_bytes_is_long_but_allowed():
    assert parse_target(b"/content/" + b"%C3%A9" * 120).path == "/content/" + "é" * 120


@given(st.binary(max_size=40) | st.binary(max_size=40).map(b"/".__add__))
def test_any_target_is_a_safe_path_or_a_problem(target):
    try:
        path = parse_target(target).path
    except Problem as problem:
        if problem.slug not in {"bad-path", "bad-request"}:
            raise
    else:
        assert path.startswith("/")
        assert path.isprintable()
        assert not any(segment.startswith(".") for segment in path.split("/"))
        assert "//" not in path
        assert "\\" not in path


# --- content


STEP = "xdelta190815061_To_190816061.dax"


@pytest.mark.parametrize(
    ("path", "kind", "parts"),
    [
        *((f"M/190815061/{full}", Kind.FULL, ("190815061", full)) for full in ("full.zip", "FULL.DAX")),
        (f"M/190815061/{STEP}", Kind.DELTA, ("190815061", STEP)),
        *((f"M/1/{file}", Kind.INDEX, ("1", file)) for file in ("xdelta.zip", "full")),
        ("M/190815061/a/full.zip", Kind.INDEX, ("190815061", "a%2Ffull.zip")),
        ("M/latest/full.zip", Kind.INDEX, ("latest", "full.zip")),
        ("M/_/full.zip", Kind.INDEX, ("%5F", "full.zip")),
        ("M/full.zip", Kind.INDEX, (ABSENT, "full.zip")),
        ("M/_", Kind.INDEX, (ABSENT, "_")),
        ("M/\u0661/full.zip", Kind.INDEX, ("\u0661", "full.zip")),
        ("ContentInfo.txt", Kind.INDEX, "ContentInfo.txt"),
        ("a/b", Kind.INDEX, "a%2Fb"),
        ("a%2Fb", Kind.INDEX, "a%252Fb"),
        ("minitri.flg", Kind.INDEX, "minitri.flg"),
    ],
)
def test_the_table_of_content(path, kind, parts):
    route = Routes().route(f"/content/{path.replace('M', MIXED)}")
    assert (route.kind, route.immutable) == (kind, kind is not Kind.INDEX)
    parts = (UPPER, *parts) if isinstance(parts, tuple) else (ABSENT, ABSENT, parts)
    assert route.key(GERMAN) == ContentKey("14.3 RU2", "de", *parts)


@pytest.mark.parametrize(
    "target",
    [
        f"/content/{MIXED}/190815061/full.zip",
        f"/content/{UPPER}/190815061/full.zip",
        f"/content/{quote(MIXED)}/190815061/full.zip",
        f"/content/{quote(LOWER).replace('%7B', '%7b')}/190815061/full.zip?again=1",
        f"http://manager:8014/content/{LOWER}/190815061/full.zip",
    ],
)
def test_a_moniker_is_one_key_however_it_is_spelled(target):
    path = parse_target(target.encode()).path
    expected = ContentKey("any", "any", UPPER, "190815061", "full.zip")
    assert Routes().route(path).key(Variant()) == expected


LOOK_ALIKES = [f"{MIXED}{more}" for more in (".", " ", "::$INDEX_ALLOCATION", ";x", "x", "}", "%")]
LOOK_ALIKES += [MIXED[1:-1], MIXED[:-1], MIXED[1:], f"x{MIXED}", "{nothing}", "{535CB~1", "{"]
OTHER_NAMES = ["full.zip.", "full.zip ", "full.zip::$DATA", "full.", "XDELTA~1.DAX", "FULLAB~12"]


@pytest.mark.parametrize("fold_case", [False, True])
def test_what_upstream_may_take_for_another_name_is_refused(fold_case):
    routes = Routes(fold_case=fold_case)
    for moniker in LOOK_ALIKES:
        assert slug(routes.route, f"/content/{moniker}/190815061/full.zip") == "bad-path", moniker
    for name in OTHER_NAMES:
        assert slug(routes.route, f"/content/{MIXED}/190815061/{name}") == "bad-path", name
        assert slug(routes.route, f"/content/{MIXED}/{name}/full.zip") == "bad-path", name
        assert slug(routes.route, f"/content/{name}") == "bad-path", name
    assert routes.route(f"/content/{MIXED}/190815061/full.a~1b").kind is Kind.FULL


@pytest.mark.parametrize(
    ("paths", "file"),
    [
        (["M/Latest/Full.ZIP", "m/LATEST/full.zip"], "{M}/latest/full.zip"),
        ([f"M/1/{STEP}", f"m/1/{STEP.upper()}", f"M/1/{STEP.lower()}"], f"{{M}}/1/{STEP}"),
        (["contentinfo.TXT", "ContentInfo.txt"], "_/_/ContentInfo.txt"),
        (["A/b\u00c9.x", "a/B\u00c9.X"], "_/_/a%2Fb\u00c9.x"),
    ],
)
def test_case_is_folded_where_no_upstream_minds_it(paths, file):
    key = ContentKey.parse(f"any/any/{file}".replace("{M}", UPPER))
    for path in paths:
        spelled = f"/content/{path}".replace("M/", f"{MIXED}/").replace("m/", f"{LOWER}/")
        route = Routes(fold_case=True).route(spelled)
        assert route.key(Variant()) == key
        assert leads_to(route.upstream_path, key)
        assert unquote(route.upstream_path) == spelled, "upstream is asked as the client spells it"


def test_managers_alone_ignore_case():
    manager, gup, liveupdate = (
        Upstream(url="http://m", kind=kind) for kind in ("manager", "gup", "liveupdate")
    )
    upper = "/content/X.TXT"
    assert Routes.of([manager, liveupdate]).route(upper).file == "x.txt"
    assert Routes.of([manager, gup]).route(upper).file == "X.TXT"
    assert Routes.of([liveupdate]).route("/PAYLOAD.ZIP").file == "PAYLOAD.ZIP"


@pytest.mark.parametrize("moniker", [UPPER, LOWER, MIXED])
def test_upstream_is_asked_in_the_clients_spelling(moniker):
    route = Routes().route(f"/content/{moniker}/190815061/full.zip")
    assert route.upstream_path == f"/content/%7B{moniker[1:-1]}%7D/190815061/full.zip"


def test_upstream_paths_are_encoded_again():
    route = Routes().route("/content/a b%$20é?#;=+.txt")
    assert route.upstream_path == "/content/a%20b%25$20%C3%A9%3F%23;=+.txt"


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/content", "/content/", "/content/folder/", "/Content/ContentInfo.txt", "/favicon.ico"),
        *("/secars/secars.dll", "/minitri.flg", "/a_1_b_livetri.zip", "/payload.zip"),
        f"/content/{MIXED}",
        f"/content/{MIXED}/",
        f"/content/{MIXED}/190815061/",
    ],
)
def test_everything_else_is_not_content(path):
    assert slug(Routes().route, path) == "not-content"


def test_names_that_grow_too_long_for_a_file_are_refused():
    assert slug(Routes().route, "/content/" + "a" * 120 + "/" + "b" * 120) == "bad-path"
    assert slug(Routes().route, f"/content/{MIXED}/{'%' * 81}/full.zip") == "bad-path"
    assert slug(Routes(liveupdate=True).route, "/" + "a" * 240 + ".zip") == "bad-path"


# --- LiveUpdate

LIVEUPDATE = Routes(liveupdate=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("minitri.flg", Kind.INDEX),
        ("1_livetri.zip", Kind.INDEX),
        ("payload.m25", Kind.OTHER),
        ("payload.7z", Kind.OTHER),
        ("payload.ZIP", Kind.OTHER),
        ("payload.jdb", Kind.OTHER),
    ],
)
def test_liveupdates_root(name, kind):
    route = LIVEUPDATE.route(f"/{name}")
    assert (route.kind, route.immutable) == (kind, kind is Kind.OTHER)
    assert route.key(GERMAN) == ContentKey("14.3 RU2", "de", LIVEUPDATE_STREAM, ABSENT, name)
    assert route.upstream_path == f"/{name}"


@pytest.mark.parametrize(
    ("name", "version", "language"),
    [
        ("sepc$20client_14.3$20RU2_French_livetri.zip", "14.3 RU2", "French"),
        ("a_b_c_12.1_SymAllLanguages_livetri.zip", "12.1", "SymAllLanguages"),
        ("a_.1_.._livetri.zip", "%2E1", "%2E."),
        ("a_1%2_de_livetri.zip", "1%252", "de"),
        ("a_12_de_LIVETRI.ZIP", "12", "de"),
    ],
)
def test_an_index_name_states_its_variant(name, version, language):
    key = LIVEUPDATE.route(f"/{name}").key(GERMAN)
    assert key.variant == Variant(version, language)
    assert unquote(key.file) == unquote(name.replace("%", "%25"))


@pytest.mark.parametrize("name", ["_livetri.zip", "a_livetri.zip", "_1_livetri.zip", "a__de_livetri.zip"])
def test_an_index_name_without_a_variant_takes_the_one_given(name):
    assert LIVEUPDATE.route(f"/{name}").key(GERMAN).variant == GERMAN


@pytest.mark.parametrize(
    "path", ["/", "/payload.exe", "/folder/payload.zip", "/payload.zip/", "/zip", "/.zip"]
)
def test_the_rest_of_liveupdates_root_is_not_content(path):
    assert slug(LIVEUPDATE.route, path) == "not-content"


# --- no two paths share a key

NAMES = st.sampled_from(
    ["a", "A", "_", "%", "%2F", "%5F", "%252F", "full.zip", "minitri.flg", "liveupdate", "1", MIXED, LOWER]
) | st.text("a%_25F/{}", min_size=1, max_size=4).map(lambda text: text.replace("/", "-"))
CONTENT_PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda names: "/content/" + "/".join(names))
ROOT_PATHS = NAMES.map(lambda name: f"/{name}.zip") | st.just("/minitri.flg")
PATHS = CONTENT_PATHS | ROOT_PATHS


def key_of(path):
    try:
        return LIVEUPDATE.route(path).key(Variant())
    except Problem as problem:
        if problem.slug not in ("not-content", "bad-path"):
            raise
        return None


def normal(path):
    """The path with a leading moniker in upper case: the only difference that may disappear."""
    names = path.split("/")
    if names[1] == "content" and names[2].upper() == UPPER:
        names[2] = UPPER
    return names


@given(PATHS, PATHS)
@example("/content/minitri.flg", "/minitri.flg")
@example("/content/a/b", "/content/a%2Fb")
@example(f"/content/{MIXED}/_/a", f"/content/{LOWER}/a")
@example(f"/content/{MIXED}/a/b/c", f"/content/{LOWER}/a/b%2Fc")
def test_two_paths_never_share_a_key(first, second):
    key = key_of(first)
    assume(key is not None)
    assert (key == key_of(second)) == (normal(first) == normal(second))


@given(PATHS)
def test_the_upstream_path_is_the_path_asked_for(path):
    assume(key_of(path) is not None)
    route = LIVEUPDATE.route(path)
    assert parse_target(route.upstream_path.replace("%2F", "%252F").encode()).path == path


@pytest.mark.parametrize("stream", [UPPER, "_", LIVEUPDATE_STREAM])
@pytest.mark.parametrize("name", ["full.zip", "xdelta260101001_To_260102001.dax"])
@pytest.mark.parametrize(
    ("folder", "leads"),
    [
        (f"/content/%7B{UPPER[1:-1]}%7D", True),
        (f"/content/%7b{LOWER[1:-1]}%7d", True),
        (f"/content/%7B{UPPER[1:-1]}", False),
        (f"/content/x/%7B{UPPER[1:-1]}%7D", False),
        (f"/content/%7B{UPPER[1:-1]}%7D/x", False),
        (f"/content/%7B{UPPER[1:-1]}%7D?", False),
        (f"/content/../%7B{UPPER[1:-1]}%7D", False),
        ("/content", False),
        ("", False),
        ("//other.example/content", False),
    ],
)
def test_a_folder_leads_to_the_files_of_its_stream_alone(folder, leads, stream, name):
    """The folder is looked at once for all of its files."""
    key = ContentKey("any", "any", stream, "260102001", name)
    for _ in range(2):
        assert leads_to(f"{folder}/260102001/{name}", key) is (leads and stream == UPPER)
    assert not leads_to(f"{folder}/260102002/{name}", key)
