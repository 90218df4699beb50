"""Signatures: what was changed by one character, repeated, sent elsewhere or to another site is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.cluster.signing import (
    SIGNATURE,
    TIME_TOLERANCE_MS,
    Question,
    Refused,
    Signer,
    read_password,
    read_secrets,
)
from gup.files import FileError

ONE, TWO, THREE = b"one-secret-of-the-site", b"another-one-of-the-site", b"somebody-else's-secret"
NOW = 1_800_000_000_000
SIGNER = Signer("lyon", (ONE,))

_texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)
_fields = st.dictionaries(
    st.sampled_from(["GUP-Key", "gup-kind", "Gup-Via", "GUP-Order"]), _texts, max_size=4
)


def ask(signer=SIGNER, **fields):
    return signer.ask("b", "a", "GET", "/x?y", NOW, {"GUP-Key": "k", **fields}.items())


def verify(question, signer=SIGNER, node="a", method="GET", target="/x?y", now=(NOW,), fields=None):
    return signer.verify_question(node, method, target, (fields or question.fields).items(), now)


@given(_texts, _texts)
def test_a_text_comes_back_from_its_seal_and_no_other_does(text, other):
    sealed = SIGNER.seal("row", text)
    assert SIGNER.unseal("row", sealed) == text
    assert SIGNER.unseal("order", sealed) is None
    assert Signer("paris", (ONE,)).unseal("row", sealed) is None
    assert SIGNER.unseal("row", other) is None
    assert SIGNER.unseal("row", sealed + "x") is None


def test_while_a_secret_is_changed_both_are_accepted_and_the_first_signs():
    old, both, turned, new = (Signer("lyon", keys) for keys in ((ONE,), (ONE, TWO), (TWO, ONE), (TWO,)))
    for signing, verifying in (
        (old, both),
        (both, old),
        (both, turned),
        (turned, both),
        (turned, new),
        (new, turned),
    ):
        assert verifying.unseal("row", signing.seal("row", "x")) == "x"
        assert isinstance(verify(ask(signing), verifying), Question)
    assert new.unseal("row", old.seal("row", "x")) is None
    assert Signer("lyon", (THREE,)).unseal("row", both.seal("row", "x")) is None


@given(_fields, _fields)
def test_a_question_is_verified_with_its_fields_and_no_others(fields, others):
    question = SIGNER.ask("b", "a", "GET", "/x", NOW, fields.items())
    assert SIGNER.verify_question("a", "GET", "/x", question.fields.items(), (NOW,)) == question
    changed = dict(question.fields) | {name.lower(): value for name, value in others.items()}
    verified = SIGNER.verify_question("a", "GET", "/x", changed.items(), (NOW,))
    assert isinstance(verified, Question) == (changed == question.fields)


@pytest.mark.parametrize(
    "change",
    [{"node": "c"}, {"method": "HEAD"}, {"target": "/y"}, {"signer": Signer("paris", (ONE,))},
     {"signer": Signer("lyon", (THREE,))}],
    ids=["node", "method", "target", "site", "secret"],
)  # fmt: skip
def test_a_question_to_another_node_or_for_another_thing_is_forged(change):
    assert verify(ask(), **change) == Refused("forged")


def test_a_question_without_one_of_its_fields_or_with_one_twice_is_forged():
    question = ask()
    for name in question.fields:
        fewer = {other: value for other, value in question.fields.items() if other != name}
        assert verify(question, fields=fewer) == Refused("forged")
        twice = [*question.fields.items(), (name.upper(), "x")]
        assert SIGNER.verify_question("a", "GET", "/x?y", twice, (NOW,)) == Refused("forged")


@pytest.mark.parametrize("time", ["", "-1", "1e3", "٣", "9" * 5000])
def test_a_time_that_is_no_number_is_forged_or_too_late(time):
    fields = dict(ask().fields) | {"gup-time": time}
    assert isinstance(verify(None, fields=fields), Refused)


def test_the_engines_time_counts_within_half_a_minute_and_the_one_before_a_jump_too():
    question = ask()
    hour = 3_600_000
    for now in ([NOW + TIME_TOLERANCE_MS], [NOW - TIME_TOLERANCE_MS], [NOW - hour, NOW]):
        assert isinstance(verify(question, now=now), Question)
    for now in ([NOW + TIME_TOLERANCE_MS + 1], [NOW - TIME_TOLERANCE_MS - 1], []):
        refused = verify(question, now=now)
        assert (refused.reason, refused.question.nonce) == ("time", question.nonce)


@given(_fields, st.integers(200, 599))
def test_an_answer_is_verified_with_its_head_and_for_its_question(fields, status):
    question, other = ask(), ask()
    head = [*fields.items(), ("ETag", '"x"'), ("Content-Length", "5"), ("Server", "gup")]
    sent = [*head, *SIGNER.answer(question, status, NOW, head).items()]
    assert SIGNER.verify_answer(question, status, sent)
    assert SIGNER.verify_answer(question, status, [pair for pair in sent if pair[0] != "Server"])
    assert not SIGNER.verify_answer(other, status, sent), "another nonce"
    assert not SIGNER.verify_answer(question, status + 1, sent)
    for name, value in sent:
        if name != "Server":
            changed = [pair if pair[0] != name else (name, value + "x") for pair in sent]
            assert not SIGNER.verify_answer(question, status, changed), name
            assert not SIGNER.verify_answer(question, status, [pair for pair in sent if pair[0] != name])
    assert not SIGNER.verify_answer(question, status, [*sent, ("etag", '"y"')])


def test_a_question_is_no_answer():
    question = ask()
    assert not SIGNER.verify_answer(question, 200, question.fields.items())
    assert SIGNATURE in question.fields


# --- the files


def test_secrets_are_lines(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(ONE + b"\n")
    assert read_secrets(file) == (ONE,)
    file.write_bytes(TWO + b"\r\n\n  " + ONE)
    assert read_secrets(file) == (TWO, ONE)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"short",
        b"\n".join([ONE, TWO, THREE]),
        ONE + b"\nshort",
        b"what is this? <html>",
        b"x" * 5000,
    ],
)
def test_what_is_no_secret_is_refused_and_not_shown(tmp_path, text):
    file = tmp_path / "secret"
    file.write_bytes(text)
    with pytest.raises(FileError, match="at least 16 characters") as caught:
        read_secrets(file)
    assert "short'" not in str(caught.value)
    assert "one-secret" not in str(caught.value)


def test_the_password_is_one_line(tmp_path):
    file = tmp_path / "password"
    file.write_bytes("passwörd\n".encode())
    assert read_password(file) == "passwörd"
    for text in (b"", b"\xff", b"a\nb", b"a b", b"x" * 5000):
        file.write_bytes(text)
        with pytest.raises(FileError, match="in one line"):
            read_password(file)
    with pytest.raises(FileError, match="can't be read"):
        read_password(tmp_path / "none")
