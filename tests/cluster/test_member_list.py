"""run/members: as written, read again only when the epoch has changed."""

from gup.cluster.member_list import ALONE, FILE, Member, Members, MembersReader, read_members, write_members
from gup.metrics import MAX_MEMBERS

THREE = Members("a", (Member("b", "http://b:2969", True), Member("c", "http://c:2969", False)), 3, ("c", "b"))


def test_the_list_is_read_as_it_was_written(tmp_path):
    assert read_members(tmp_path) == ALONE
    write_members(tmp_path, THREE)
    assert read_members(tmp_path) == THREE
    assert THREE.askable == {"b": "http://b:2969"}
    assert THREE.names == {"a", "b", "c"}
    assert [THREE.slot(name) for name in "bcx"] == [1, 0, MAX_MEMBERS]


def test_a_damaged_list_is_none(tmp_path):
    for text in ("", "{", "[]", '{"node": 1}', '{"others": [{"name": "b"}]}'):
        (tmp_path / FILE).write_text(text)
        assert read_members(tmp_path) == ALONE


def test_it_is_read_again_when_the_epoch_has_changed(tmp_path):
    epoch = [0]
    reader = MembersReader(tmp_path, lambda: epoch[0])
    assert reader() is ALONE
    write_members(tmp_path, THREE)
    assert reader() is ALONE
    epoch[0] = 1
    assert reader() == THREE
    assert reader() is reader()
