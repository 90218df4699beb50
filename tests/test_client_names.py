"""What clients are called: addresses, or keyed hashes of them."""

import pytest

from gup.client_names import ClientNames, is_name, read_key


def test_one_key_for_all_processes(tmp_path):
    key = read_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == key
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    one, other = ClientNames("hashed", key), ClientNames("hashed", b"o" * 32)
    assert one.of("10.0.0.1") == one.of("::ffff:10.0.0.1") == ClientNames("hashed", key).of("10.0.0.1")
    assert one.of("10.0.0.1") != other.of("10.0.0.1")
    assert is_name(one.of("10.0.0.1"))


def test_a_key_that_cannot_be_kept_or_read(tmp_path, caplog):
    (tmp_path / "key").write_text("no key")
    assert len(read_key(tmp_path / "key")) == 32
    assert len(read_key(tmp_path / "none" / "key")) == 32
    assert caplog.text.count("can't be kept") == 2


@pytest.mark.parametrize(
    ("name", "good"),
    [("10.0.0.1", True), ("fe80::1", True), ("h-0123456789abcdef", True), ("h-xyz", False), ("<b>", False)],
)
def test_names(name, good):
    assert is_name(name) is good
