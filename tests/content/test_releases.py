"""Names and builds of releases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.releases import KNOWN_RELEASES, Release, Releases, find_release, mistakes

RELEASES = Releases()
BUILDS = st.tuples(st.integers(100, 20000), st.integers(0, 20000))


WRITTEN = {
    # "14.3.2": as the vendor counts, the third number is the update; then the first build, and patched ones
    "14.3 RU2": ["14.3 RU2", "14.3RU2", "14.3-ru2", " 14.3  RU 2 ", "14.3.2", "14.3.4615.2000"],
    "14.3 RU2 MP1": ["14.3.2.1"],
    "14.3 RU1": ["14.3.4614.9999"],  # the last build before RU2
    "14.3 RU3": ["14.3.5413.3000", "14.3.5413.3000.105"],  # the second as installed folders are called
    "14.3": ["14.3", "14.3.558.0000", "14.3.557.0000"],  # older than any known: all that can be told
    "14.0": ["14"],
    "12.1 RU6 MP10": ["12.1 RU6 MP10"],
    "14.3 RU8": ["14.3 RU8 Patch 3"],
    "14.2": ["14.2.1031.0100"],  # another minor version's builds are not compared
    "14.4": ["14.4.200.0000"],
    "15.0": ["15.0.1000.0000"],
}
WRITTEN["14.3 RU2"] += ["14.3.4700.2000", "14.3.5412.3000"]


@pytest.mark.parametrize(("release", "texts"), WRITTEN.items())
def test_names_and_builds_are_one_thing(release, texts):
    for text in texts:
        assert str(RELEASES.version(text).release) == release
        assert RELEASES.version(text).release == RELEASES.version(release).release


def test_what_is_no_version_is_none():
    texts = ("", "any", "v1", "RU2", "14.3 RU", "14.3.4615", "14.3 RU2 x", "SEP 14.3", "1" * 65, "14,3")
    assert not any(RELEASES.version(text) for text in (*texts, "\u0661\u0664.3"))


def test_every_known_release_begins_at_its_build():
    for name, build in KNOWN_RELEASES.items():
        assert str(RELEASES.version(build).release) == name
        assert RELEASES.version(build) == RELEASES.version(name)
    firsts = [RELEASES.version(build).build for build in KNOWN_RELEASES.values()]
    assert firsts == sorted(firsts)


def test_releases_stand_in_the_order_they_came():
    names = ["12.1 RU6 MP10", "14", "14.2", "14.3", "14.3 MP1", "14.3 RU1", "14.3 RU2", "14.3 RU10", "14.4"]
    found = [RELEASES.version(name).release for name in names]
    assert found == sorted(found)
    assert Release(14, 3, 2) < Release(14, 3, 10)


@pytest.mark.parametrize(
    ("one", "order", "other"),
    [
        ("14.3.4615.2000", "=", "14.3 RU2"),  # a name stands for its first build
        ("14.3 RU2", "<", "14.3.4700.2000"),
        ("14.3.4700.2000", "=", "14.3.4700.2000.105"),
        ("14.3.4615.2000", "<", "14.3.4700.2000"),
        ("14.3 RU1", "<", "14.3 RU2"),
        ("14.3 RU8 Patch 3", "=", "14.3RU8 patch 3"),
        ("14.3 RU8 Patch 3", "?", "14.3 RU8 Patch 2"),
        ("14.3 RU8 Patch 3", "?", "14.3 RU8"),  # its build is not known: neither is older
        ("12.1 RU6", "=", "12.1RU6"),  # first builds not known
    ],
)
def test_which_versions_are_equal_and_which_is_older(one, order, other):
    first, second = RELEASES.version(one), RELEASES.version(other)
    assert (first == second) is (order == "=")
    assert (first.older_than(second), second.older_than(first)) == (order == "<", False)
    assert (first.release == second.release) is (one != "14.3 RU1")


def test_versions_show_their_release():
    shown = ["14.3.4700.2000", "14.3 ru2", "14.3 RU8 patch 3"]
    assert [str(RELEASES.version(text)) for text in shown] == [
        "14.3 RU2 (14.3.4700.2000)",
        "14.3 RU2",
        "14.3 RU8 Patch 3",
    ]


def test_settings_add_releases_and_win():
    releases = Releases({"14.3 RU11": "14.3.13000.11000", "14.3 RU3": "14.3.5500.3000"})
    assert str(releases.version("14.3.13001.11000").release) == "14.3 RU11"
    assert str(RELEASES.version("14.3.13001.11000").release) == "14.3 RU10"
    assert str(releases.version("14.3.5413.3000").release) == "14.3 RU2"


def test_wrong_additions_are_named():
    wrong = {"RU11": "14.3.13000.11000", "14.3 RU12": "soon", "14.3 RU13": "14.3.14000.13000"}
    assert [name for name, _ in mistakes(wrong)] == ["RU11", "14.3 RU12"]
    assert "'soon'" in dict(mistakes(wrong))["14.3 RU12"]
    with pytest.raises(ValueError, match=r"'RU11' = '14\.3\.13000\.11000'"):
        Releases(wrong)


@pytest.mark.parametrize(
    ("product", "release"),
    [
        ("SEPC Virus Definitions Win32 12.1 RU6", "12.1 RU6"),
        ("SEPC Virus Definitions Win64 (x64) 14.3", "14.3"),
        ("SEPC Client Patch Win64 14.3 RU10", "14.3 RU10"),
        ("SEP 14.3.4615.2000 patch", "14.3.4615.2000"),
        ("SEPM Virus Definitions Win32 v11", ""),
        ("SEP v14.3x", ""),
        ("", ""),
    ],
)
def test_the_release_in_a_products_name(product, release):
    assert find_release(product) == release


@given(BUILDS, BUILDS)
def test_a_later_build_is_never_of_an_older_release(one, other):
    first, second = sorted((one, other))
    early, late = (RELEASES.version(f"14.3.{build}.{tail}") for build, tail in (first, second))
    assert early.release <= late.release


@given(st.text(max_size=70))
def test_no_text_breaks_it(text):
    found = RELEASES.version(text)
    assert found is None or str(found)
    assert isinstance(find_release(text), str)
